"""Search for the draft with the most tokens per second: the number of layers on each rung, by given rankings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from dropformer.metrics.draft.acceptance import Acceptance, DenseText
from dropformer.metrics.draft.formula import Verify, best
from dropformer.metrics.repair.base import Repair
from dropformer.progress import Tick
from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import Surgery, map_blocks
from dropformer.prune.choosing import check_attention_left
from dropformer.prune.draft.generation import sources_of
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import Outline
from dropformer.prune.surgery.surgery import apply_surgery
from dropformer.prune.surgery.views import sharing_copy
from dropformer.prune.window import Window

SHARES = (0.0, 0.07, 0.2, 0.4, 0.6, 0.8, 1.0)  # of a rung's layers
ROUNDS = 2


@dataclass(frozen=True)
class Rung:
    """A way to make layers cheaper, and the layers in the order in which it takes them.  window None: dropped."""

    name: str
    ranking: tuple[Layer, ...]
    window: Window | None = None

    def counts(self, most: int | None) -> list[int]:
        """Numbers of layers to try; at most `most` if they are dropped."""
        limit = len(self.ranking) if most is None or self.window else min(most, len(self.ranking))
        return sorted({min(limit, round(share * len(self.ranking))) for share in SHARES})


Cost = Callable[[Sequence[Layer], Mapping[Layer, Window]], float]
"""A step of the dense model without these layers and with these windows, over a dense step."""


@dataclass(frozen=True)
class Candidate:
    """A measured draft: its dropped and windowed layers, acceptance, cost and speed-up."""

    layers: tuple[Layer, ...]
    windows: Mapping[Layer, Window]
    acceptance: float
    agreement: float
    cost: float
    tokens: int
    speedup: float


@dataclass
class DraftSearch:
    """Coordinate ascent over the counts of all rungs; each candidate is measured once (see `DenseText`).

    `verify`: cost of verifying.  `most`: the largest number of dropped layers, None for no limit.
    """

    text: DenseText
    outline: Outline
    cost: Cost
    verify: Verify
    most: int | None = None
    tried: dict[tuple, Candidate] = field(default_factory=dict)

    def __call__(self, rungs: Sequence[Rung], tick: Tick | None = None) -> Candidate:
        """The best draft of these rungs.  Raises PlanError where no rung has a layer."""
        counts = [0] * len(rungs)
        found = None
        for _ in range(ROUNDS):
            before = list(counts)
            for i, rung in enumerate(rungs):
                options = []
                for count in rung.counts(self.most):
                    trial = [*counts[:i], count, *counts[i + 1 :]]
                    if (candidate := self._candidate(rungs, trial)) is not None:
                        options.append((candidate.speedup, -sum(trial), count, candidate))
                    if tick:
                        tick(len(self.tried), 0)
                if options:
                    _, _, counts[i], found = max(options, key=lambda option: option[:2])
            if counts == before:
                break
        if found is None:
            raise PlanError("no layer may be dropped or windowed for a draft; name other --rungs, or protect fewer")
        return found

    def _candidate(self, rungs: Sequence[Rung], counts: Sequence[int]) -> Candidate | None:
        layers, windows = _taken(rungs, counts)
        if (not layers and not windows) or (self.most is not None and len(layers) > self.most):
            return None
        key = (frozenset(layers), frozenset(windows.items()))
        if key not in self.tried:
            try:
                check_attention_left(self.outline, layers)
            except PlanError:
                return None
            self.tried[key] = self.measured(layers, windows)
        return self.tried[key]

    def measured(
        self, layers: Sequence[Layer], windows: Mapping[Layer, Window], repair: Repair | None = None
    ) -> Candidate:
        """Measure one draft: acceptance on the text, cost, and the best number of drafted tokens."""
        draft, sources = draft_in_place(self.text.model, self.outline, layers, windows, repair)
        found: Acceptance = self.text.acceptance(draft, sources)
        cost = self.cost(layers, windows)
        tokens, gives = best(found.mean, cost, self.verify)
        agreement = float(found.agreement.mean())
        return Candidate(tuple(layers), dict(windows), found.mean, agreement, cost, tokens, gives)


def _taken(rungs: Sequence[Rung], counts: Sequence[int]) -> tuple[list[Layer], dict[Layer, Window]]:
    """The first layers of each rung that no earlier rung has taken: dropped ones and windows."""
    layers: list[Layer] = []
    windows: dict[Layer, Window] = {}
    blocks: set[tuple[str, int]] = set()
    for rung, count in zip(rungs, counts, strict=True):
        free = [
            layer
            for layer in rung.ranking
            if layer not in layers and layer not in windows and (layer.stack, layer.index) not in blocks
        ]
        for layer in free[:count]:
            if rung.window:
                windows[layer] = rung.window
            else:
                layers.append(layer)
            if layer.kind == "block":
                blocks.add((layer.stack, layer.index))
    return layers, windows


def draft_in_place(
    model: PreTrainedModel,
    outline: Outline,
    layers: Sequence[Layer],
    windows: Mapping[Layer, Window],
    repair: Repair | None = None,
) -> tuple[PreTrainedModel, list[int]]:
    """The draft, with unchanged block numbers, and the source block of each attention layer.

    It shares the weights that `repair` does not change.
    """
    surgery = surgery_in_place(outline, layers, windows, repair)
    rounded = {name: tensor.to(model.dtype) for name, tensor in surgery.tensors.items()}
    return apply_surgery(sharing_copy(model), replace(surgery, tensors=rounded)), sources_of(surgery)


def surgery_in_place(
    outline: Outline, layers: Sequence[Layer], windows: Mapping[Layer, Window], repair: Repair | None = None
) -> Surgery:
    """The surgery that drops, windows and repairs while every block keeps its number."""
    block_map = map_blocks(outline, layers, False, rungs=windows)
    return Surgery(outline, tuple(layers), block_map, tensors=repair.named(outline, block_map) if repair else {})
