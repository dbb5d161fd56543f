"""compare.json: similarity per layer and checkpoint, and agreement between checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import comb

import numpy as np

from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.prune.architecture import KIND_NAMES, Layer
from dropformer.prune.artifact import Artifact, FrozenRecord, ModelRef
from dropformer.prune.choosing import choose
from dropformer.prune.errors import PlanError
from dropformer.prune.spec import parse_spec

Matrix = list[list[float | None]]
LOWEST = float("-inf")  # score of a dropped layer, below every other


class CheckpointScores(FrozenRecord):
    """One checkpoint.  `similarity` maps a layer kind to one value per block of the original model.

    A value is None where the checkpoint has no such layer.  `chosen` are the layers that the drop spec selects,
    `gone` those already dropped.  `same_weights_as` names an earlier checkpoint with equal weights: training suites
    do publish some twice.
    """

    label: str
    step: int | None = None
    model: ModelRef
    gone: list[str] = []
    same_weights_as: str | None = None
    similarity: dict[str, list[float | None]]
    mean: dict[str, float | None]
    chosen: list[str] | None = None


class KnownFrom(FrozenRecord):
    """The first checkpoint from which on all drop sets equal the last one's (not for pruned checkpoints)."""

    label: str
    step: int | None = None
    index: int


class Comparison(Artifact):
    """Checkpoints in training order, all measured on the same tokens.

    `spearman` maps each layer kind to the pairwise rank correlations of similarity, over the layers that both
    checkpoints have; `overlap` is the pairwise Jaccard index of the drop sets, and `overlap_by_chance` its mean for
    two random sets of that size.
    """

    kind = "comparison"
    spec: str | None = None
    keep: list[int] = []
    metric: str = "similarity"
    calibration: CalibrationRef
    checkpoints: list[CheckpointScores]
    spearman: dict[str, Matrix]
    overlap: list[list[float]] | None = None
    overlap_by_chance: float | None = None
    known_from: KnownFrom | None = None

    @property
    def kinds(self) -> list[str]:
        return list(self.checkpoints[0].similarity)

    @property
    def steps(self) -> list[int] | None:
        """The training steps, None unless all are known."""
        found = [checkpoint.step for checkpoint in self.checkpoints if checkpoint.step is not None]
        return found if len(found) == len(self.checkpoints) else None

    def spearman_to_last(self, kind: str) -> list[float | None]:
        return [row[-1] for row in self.spearman[kind]]


@dataclass(frozen=True)
class Entry:
    """A checkpoint's label and step, its scores by original layer index, and its dropped layers."""

    label: str
    step: int | None
    scores: Scores
    gone: list[str] = field(default_factory=list)


def compare_scores(entries: Sequence[Entry], spec: str | None = None, keep: Sequence[int] = ()) -> Comparison:
    """Compare checkpoints by their aligned scores.  Raises PlanError if one has fewer layers than the spec drops."""
    chosen = [chosen_layers(entry.scores, spec, keep) if spec else None for entry in entries]
    names = _kinds(entries)
    checkpoints = [_row(entry, names, layers) for entry, layers in zip(entries, chosen, strict=True)]
    known = _with_twins(checkpoints)
    sets = [frozenset(layers) for layers in chosen if layers is not None]
    calibration = entries[0].scores.calibration
    assert calibration is not None
    return Comparison(
        spec=spec,
        keep=list(keep),
        calibration=calibration,
        checkpoints=known,
        spearman={kind: _pairwise([c.similarity[kind] for c in known]) for kind in names},
        overlap=[[jaccard(a, b) for b in sets] for a in sets] if sets else None,
        overlap_by_chance=_by_chance(entries[-1].scores, spec, sets[-1]) if spec else None,
        known_from=_known_from(known, sets) if sets and not any(entry.gone for entry in entries) else None,
    )


def chosen_layers(scores: Scores, spec: str, keep: Sequence[int] = ()) -> list[Layer]:
    """The layers that a spec of counts selects by aligned scores, dropped ones excluded.  Raises PlanError."""
    check_counts(spec)
    similarity = scores.similarity()
    blocks = [layer for stack in scores.outline.stacks for layer in scores.outline.layers("block", stack.name)]
    found = choose(scores.outline, spec, {**dict.fromkeys(blocks, LOWEST), **similarity}, keep)
    if missing := [layer for layer in found if layer not in similarity]:
        raise PlanError(f"`{spec}` drops more blocks than {scores.model.name} has left ({missing[0]} is dropped)")
    return found


def check_counts(spec: str) -> None:
    """Raises PlanError for a spec that names its layers."""
    if any(s.published or s.indices is not None for s in parse_spec(spec)):
        raise PlanError(f"--drop `{spec}` names layers, which every checkpoint would share; give counts, as in attn:8")


def kind_title(kind: str) -> str:
    """`encoder.attn` -> `encoder attention`."""
    stack, _, name = kind.rpartition(".")
    return f"{stack} {KIND_NAMES[name]}".strip()


def spearman(x: Sequence[float | None], y: Sequence[float | None]) -> float | None:
    """Spearman's rank correlation over the positions where both have a value; ties share their mean rank.

    None for fewer than three positions, or if all values of one are equal.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    if len(pairs) < 3:
        return None
    ranks = [_ranks(np.array(column)) for column in zip(*pairs, strict=True)]
    centered = [r - r.mean() for r in ranks]
    scale = float(np.sqrt((centered[0] ** 2).sum() * (centered[1] ** 2).sum()))
    return float((centered[0] * centered[1]).sum()) / scale if scale else None


def jaccard(a: frozenset[Layer], b: frozenset[Layer]) -> float:
    """|a and b| / |a or b|, 1 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 1.0


def jaccard_by_chance(chosen: int, total: int) -> float:
    """The mean Jaccard index of two random subsets of `chosen` out of `total` (hypergeometric)."""
    ways = comb(total, chosen)
    shared = range(max(0, 2 * chosen - total), chosen + 1)
    return sum(comb(chosen, s) * comb(total - chosen, chosen - s) / ways * s / (2 * chosen - s) for s in shared)


def _kinds(entries: Sequence[Entry]) -> list[str]:
    """The layer kinds of all checkpoints, such as block, attn and mlp, prefixed by the stack's name if it has one."""
    layers = (layer for entry in entries for layer in entry.scores.similarity())
    return list(dict.fromkeys(f"{layer.stack}.{layer.kind}".lstrip(".") for layer in layers))


def _row(entry: Entry, kinds: Iterable[str], chosen: list[Layer] | None) -> CheckpointScores:
    similarity = {str(layer): value for layer, value in entry.scores.similarity().items()}
    counts = {stack.name: stack.blocks for stack in entry.scores.outline.stacks}
    values = {kind: [similarity.get(f"{kind}:{i}") for i in range(counts[kind.rpartition(".")[0]])] for kind in kinds}
    return CheckpointScores(
        label=entry.label,
        step=entry.step,
        model=entry.scores.model,
        gone=entry.gone,
        similarity=values,
        mean={kind: _mean(column) for kind, column in values.items()},
        chosen=None if chosen is None else [str(layer) for layer in chosen],
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _with_twins(checkpoints: Sequence[CheckpointScores]) -> list[CheckpointScores]:
    first: dict[str, str] = {}
    found = []
    for checkpoint in checkpoints:
        twin = first.setdefault(checkpoint.model.fingerprint or checkpoint.label, checkpoint.label)
        same = None if twin == checkpoint.label else twin
        found.append(checkpoint.model_copy(update={"same_weights_as": same}))
    return found


def _pairwise(columns: Sequence[Sequence[float | None]]) -> Matrix:
    return [[spearman(a, b) for b in columns] for a in columns]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 for the smallest; ties share their mean rank.  [N] -> [N]."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[group]


def _known_from(checkpoints: Sequence[CheckpointScores], sets: Sequence[frozenset[Layer]]) -> KnownFrom:
    index = len(sets) - 1
    while index and sets[index - 1] == sets[-1]:
        index -= 1
    return KnownFrom(label=checkpoints[index].label, step=checkpoints[index].step, index=index)


def _by_chance(scores: Scores, spec: str, chosen: frozenset[Layer]) -> float | None:
    """`jaccard_by_chance` for a spec of one item; with several pools there is no such closed form."""
    selectors = parse_spec(spec)
    if len(selectors) > 1:
        return None
    total = sum(len(scores.outline.layers(kind, selectors[0].stack)) for kind in selectors[0].kinds)
    return jaccard_by_chance(len(chosen), total)
