"""Gaps of a pruned model: the branch before each, and the sets of dropped layers that one refit may compensate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from dropformer.metrics.repair.independent import RefitTarget, Unit
from dropformer.metrics.repair.slots import OutputProjection
from dropformer.prune.architecture import Architecture, Layer


def gaps(architecture: Architecture, dropped: Sequence[Layer]) -> dict[Layer, list[Layer]]:
    """The last kept branch before each gap -> the dropped branches that it compensates, by depth.

    In a parallel block that lost one branch it is the other one.  Branches dropped from the first block on have none
    before them and are left out.
    """
    order, lost = in_order(architecture, dropped)
    found: dict[Layer, list[Layer]] = defaultdict(list)
    last: Layer | None = None
    for layer in order:
        if layer not in lost:
            last = layer
            continue
        where = _mate(architecture, layer, lost) or last
        if where is not None:
            found[where].append(layer)
    return dict(found)


def gap_targets(
    architecture: Architecture, dropped: Sequence[Layer], slots: Mapping[Layer, OutputProjection]
) -> list[RefitTarget]:
    """The fit of each gap that follows a slot."""
    return [
        RefitTarget(slots[layer], tuple((one,) for one in lost), (tuple(range(len(lost))),))
        for layer, lost in gaps(architecture, dropped).items()
        if layer in slots
    ]


def reaches(
    architecture: Architecture, candidates: Sequence[Layer], slots: Mapping[Layer, OutputProjection], depth: int
) -> list[RefitTarget]:
    """For each slot the sets of candidates that it may have to compensate, among the nearest `depth` of them.

    A unit is what one candidate drops: a branch or, if only whole blocks may be dropped, a block's branches.
    Example, attention and MLP layers free, depth 2: mlp:3 may compensate {attn:4} and {attn:4, mlp:4}.
    """
    order, free = in_order(architecture, candidates)
    whole = all(layer.kind == "block" for layer in candidates)
    found = []
    for n, layer in enumerate(order):
        near = order[n + 1 :] if not whole else [other for other in order[n + 1 :] if other.index != layer.index]
        mates = [o for o in order[:n] if o in free and o.index == layer.index and architecture.block(o).parallel]
        units = _units([*(() if whole else mates), *near], free, whole)[:depth]
        starts = not whole or n + 1 == len(order) or order[n + 1].index != layer.index
        if units and starts and layer in slots:
            prefixes = [tuple(range(end)) for end in range(1, len(units) + 1)]
            alone = [(i,) for i in range(1, len(units))] if architecture.block(layer).parallel and not whole else []
            found.append(RefitTarget(slots[layer], tuple(units), (*prefixes, *alone)))
    return found


def _units(order: Sequence[Layer], free: set[Layer], whole: bool) -> list[Unit]:
    """The candidates at the beginning of `order`, up to the first branch that is not one."""
    near: list[Layer] = []
    for layer in order:
        if layer not in free:
            break
        near.append(layer)
    if not whole:
        return [(layer,) for layer in near]
    blocks: dict[tuple[str, int], list[Layer]] = defaultdict(list)
    for layer in near:
        blocks[layer.stack, layer.index].append(layer)
    return [tuple(block) for block in blocks.values()]


def _mate(architecture: Architecture, layer: Layer, lost: set[Layer]) -> Layer | None:
    """The branch of a parallel block that is kept if `layer` is dropped."""
    block = architecture.block(layer)
    found = [Layer(b.kind, layer.index, layer.stack) for b in block.branches if block.parallel]
    return next((other for other in found if other not in lost), None)


def all_slots(
    architecture: Architecture, dropped: Sequence[Layer], slots: Mapping[Layer, OutputProjection]
) -> list[OutputProjection]:
    """The slot before the first gap, and every later one."""
    order, lost = in_order(architecture, dropped)
    first = min((order.index(layer) for layer in lost), default=len(order))
    kept = [layer for layer in order[max(first - 1, 0) :] if layer not in lost]
    return [slots[layer] for layer in kept if layer in slots]


def in_order(architecture: Architecture, dropped: Sequence[Layer]) -> tuple[list[Layer], set[Layer]]:
    """Every branch of the model in order of depth, and those that are dropped."""
    order = [layer for stack in architecture.stacks for layer in stack.layers() if layer.kind != "block"]
    return order, {Layer(b.kind, d.index, d.stack) for d in dropped for b in architecture.branches(d)}
