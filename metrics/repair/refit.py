"""Which projections to refit once layers are dropped; the change folds into their weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from dropformer.metrics.repair.independent import Unit
from dropformer.metrics.repair.projection import OutputProjection
from dropformer.prune.architecture import Architecture, Layer


def gaps(architecture: Architecture, gone: Sequence[Layer]) -> dict[Layer, list[Layer]]:
    """The last branch that is left before each gap, and the dropped branches that it stands in for, by depth.

    In a parallel block that lost one branch that is the other branch.  Branches gone from the first block on
    have none before them.
    """
    order, dropped = in_order(architecture, gone)
    found: dict[Layer, list[Layer]] = defaultdict(list)
    last: Layer | None = None
    for layer in order:
        if layer not in dropped:
            last = layer
            continue
        where = _mate(architecture, layer, dropped) or last
        if where is not None:
            found[where].append(layer)
    return dict(found)


def gap_slots(
    architecture: Architecture, gone: Sequence[Layer], projections: Mapping[Layer, OutputProjection]
) -> list[OutputProjection]:
    """The projections before the gaps: each learns what the dropped layers would have added."""
    return [projections[layer] for layer in gaps(architecture, gone) if layer in projections]


def reaches(
    architecture: Architecture, candidates: Sequence[Layer], projections: Mapping[Layer, OutputProjection], depth: int
) -> dict[OutputProjection, tuple[Unit, ...]]:
    """For each projection the units whose loss it may have to take over, the nearest `depth` of them.

    A unit is what one candidate would take: a branch, or, where only whole blocks may go, a block's branches.
    """
    order, free = in_order(architecture, candidates)
    whole = all(layer.kind == "block" for layer in candidates)
    found: dict[OutputProjection, tuple[Unit, ...]] = {}
    for n, layer in enumerate(order):
        near = order[n + 1 :] if not whole else [other for other in order[n + 1 :] if other.index != layer.index]
        mates = [o for o in order[:n] if o in free and o.index == layer.index and architecture.block(o).parallel]
        units = _units([*(() if whole else mates), *near], free, whole)[:depth]
        starts = not whole or n + 1 == len(order) or order[n + 1].index != layer.index
        if units and starts and layer in projections:
            found[projections[layer]] = tuple(units)
    return found


def _units(order: Sequence[Layer], free: set[Layer], whole: bool) -> list[Unit]:
    """What may go right behind a place, up to the first branch that may not."""
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


def _mate(architecture: Architecture, layer: Layer, dropped: set[Layer]) -> Layer | None:
    """The branch of a parallel block that stays where `layer` goes."""
    block = architecture.block(layer)
    found = [Layer(b.kind, layer.index, layer.stack) for b in block.branches if block.parallel]
    return next((other for other in found if other not in dropped), None)


def all_slots(
    architecture: Architecture, gone: Sequence[Layer], projections: Mapping[Layer, OutputProjection]
) -> list[OutputProjection]:
    """The projection before the first gap, and every one behind it."""
    order, dropped = in_order(architecture, gone)
    first = min((order.index(layer) for layer in dropped), default=len(order))
    kept = [layer for layer in order[max(first - 1, 0) :] if layer not in dropped]
    return [projections[layer] for layer in kept if layer in projections]


def in_order(architecture: Architecture, gone: Sequence[Layer]) -> tuple[list[Layer], set[Layer]]:
    """Every branch of the model in order of depth, and those that are gone."""
    order = [layer for stack in architecture.stacks for layer in stack.layers() if layer.kind != "block"]
    dropped = {Layer(b.kind, g.index, g.stack) for g in gone for b in architecture.branches(g)}  # type: ignore[arg-type]
    return order, dropped
