"""Map the scores of a pruned checkpoint to the layer indices of its dense model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropformer.metrics.analysis.scores import LayerScore, Scores
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import CheckpointError
from dropformer.prune.outline import BranchOutline, Outline, StackOutline

KINDS = {"attention": "attn", "mlp": "mlp", "cross_attention": "cross", "blocks": "block"}


@dataclass(frozen=True)
class StackOrigin:
    """One stack of a pruned model: for each of its blocks the original indices of its attention and MLP.

    `dropped` are the dropped layers as (kind, original index); a dropped block includes its layers.
    """

    blocks: tuple[tuple[int, int], ...]
    dropped: frozenset[tuple[str, int]]

    @property
    def count(self) -> int:
        """Number of blocks of the original: the highest index that is kept or dropped, plus one."""
        return 1 + max([*(i for pair in self.blocks for i in pair), *(i for _, i in self.dropped)])

    def original(self, kind: str, index: int) -> int | None:
        """The original index of a layer of the pruned model, None if the original has no such layer."""
        attention, mlp = self.blocks[index]
        if kind == "block" and attention != mlp:
            return None  # attention of one original block, MLP of another
        found = mlp if kind == "mlp" else attention
        return None if {(kind, found), ("block", found)} & self.dropped else found


Origin = Mapping[str, StackOrigin]
"""A pruned model's `StackOrigin` by stack name."""


def read_origin(folder: Path) -> Origin | None:
    """The origin in a checkpoint's dropformer.json, None for a dense one.  Raises CheckpointError if malformed."""
    path = folder / "dropformer.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        dropped, blocks = record["dropped"], record["original_blocks"]
        if all(isinstance(value, list) for value in dropped.values()):
            dropped, blocks = {"main": dropped}, {"": blocks}
        return {name: _stack(blocks[name], dropped[name or "main"]) for name in blocks}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} does not say which layers are dropped ({why})") from None


def _stack(blocks: Mapping[str, Any], dropped: Mapping[str, list[int]]) -> StackOrigin:
    pairs = [blocks[str(new)] for new in range(len(blocks))]
    return StackOrigin(
        tuple((int(p["attention"]), int(p["mlp"])) if isinstance(p, dict) else (int(p), int(p)) for p in pairs),
        frozenset((KINDS[name], int(index)) for name, indices in dropped.items() for index in indices),
    )


def aligned(scores: Scores, origin: Origin | None) -> Scores:
    """The scores by original layer index; dropped layers have none."""
    if origin is None:
        return scores
    layers = []
    for score in scores.layers:
        layer = Layer.parse(score.layer)
        index = origin[layer.stack].original(layer.kind, layer.index)
        if index is not None:
            layers.append(LayerScore(layer=str(Layer(layer.kind, index, layer.stack)), **_rest(score)))
    layers.sort(key=lambda score: (Layer.parse(score.layer).stack, Layer.parse(score.layer).index))
    stacks = [_outline(stack, origin[stack.name]) for stack in scores.outline.stacks]
    outline = Outline(stacks=stacks, parameters=scores.outline.parameters)
    return scores.model_copy(update={"layers": layers, "outline": outline})


def _rest(score: LayerScore) -> dict[str, Any]:
    return score.model_dump(exclude={"layer"})


def _outline(stack: StackOutline, origin: StackOrigin) -> StackOutline:
    branches = []
    for branch in stack.branches:
        found = [origin.original(branch.kind, index) for index in branch.blocks]
        left = sorted(index for index in found if index is not None)
        if left:
            branches.append(BranchOutline(**{**branch.model_dump(), "blocks": left}))
    rest = [b.model_copy(update={"blocks": [origin.blocks[index][0] for index in b.blocks]}) for b in stack.rest]
    return StackOutline(**{**stack.model_dump(), "blocks": origin.count, "branches": branches, "rest": rest})
