"""Which projections to refit once layers are dropped; the change folds into their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from dropformer.metrics.projection import Slot
from dropformer.prune.architecture import Architecture, Layer


def gap_slots(architecture: Architecture, gone: Sequence[Layer], projections: Mapping[Layer, Slot]) -> list[Slot]:
    """The last projection that is left before each gap: it learns what the dropped layers would have added.

    In a parallel block that lost one branch that is the other branch's.
    """
    order, dropped = in_order(architecture, gone)
    slots = {}
    for before, layer in pairwise([None, *order]):
        if layer not in dropped:
            continue
        where = _mate(architecture, layer, dropped) or before
        if where not in dropped and where in projections:
            slots[where] = projections[where]  # type: ignore[index]
    return list(slots.values())


def _mate(architecture: Architecture, layer: Layer, dropped: set[Layer]) -> Layer | None:
    """The branch of a parallel block that stays where `layer` goes."""
    block = architecture.block(layer)
    found = [Layer(b.kind, layer.index, layer.stack) for b in block.branches if block.parallel]
    return next((other for other in found if other not in dropped), None)


def all_slots(architecture: Architecture, gone: Sequence[Layer], projections: Mapping[Layer, Slot]) -> list[Slot]:
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
