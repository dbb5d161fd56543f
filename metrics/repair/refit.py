"""Ridge refit of the output projection before each gap; the change folds into its weights."""

from __future__ import annotations

from collections.abc import Sequence

from dropformer.metrics.repair.base import Changes, Foresight, RepairContext
from dropformer.metrics.repair.gaps import gap_targets, gaps, reaches
from dropformer.metrics.repair.independent import IndependentRefit, RefitTarget, SlotFit
from dropformer.metrics.repair.slots import BranchOutput, projections
from dropformer.prune.architecture import Layer

DEPTH = 2  # consecutive candidates whose refit a search can foresee

Fits = dict[tuple[str, frozenset[Layer]], SlotFit]


def fit_gaps(context: RepairContext) -> Changes:
    """An independent refit for each gap.  Time: a dense pass up to the last gap that no search has fitted."""
    slots = projections(context.outputs)
    free = {layer: slot for layer, slot in slots.items() if layer not in context.before.maps}
    wanted = gap_targets(context.architecture, context.branches, free)
    return _changes(context, context.branches, fitted(context, wanted))


def foresee_gaps(context: RepairContext, candidates: Sequence[Layer], count: int) -> Foresight:
    """Refits for gaps of up to two consecutive candidates, from one dense pass up to the last of them."""
    wanted = reaches(context.architecture, candidates, projections(context.outputs), min(count, DEPTH))
    known = fitted(context, wanted)

    def foresee(dropped: Sequence[Layer], before: Changes) -> Changes:
        left = [layer for layer in context.outline.branch_layers(dropped) if layer not in before.maps]
        return _changes(context, left, known, before)

    return foresee


def fitted(context: RepairContext, wanted: Sequence[RefitTarget], method: str = "refit") -> Fits:
    """The fits of a method, with the wanted ones that it lacks fitted in one dense pass."""
    known: Fits = context.memory.setdefault(method, {})
    new = [target for target in wanted if any((target.slot.path, lost) not in known for lost in _sets(target))]
    groups = [context.groups[batch] for batch in context.fitted_on]
    IndependentRefit(context.runner, context.outputs, context.fitted_on, groups, fits=known).run(new)
    return known


def _sets(target: RefitTarget) -> list[frozenset[Layer]]:
    return [frozenset(layer for i in chosen for layer in target.units[i]) for chosen in target.wanted]


def _changes(context: RepairContext, dropped: Sequence[Layer], known: Fits, before: Changes | None = None) -> Changes:
    """The changes for dropped layers.  A gap deeper than any fit gets the deepest fit within it."""
    mapped = (before or context.before).maps
    found = Changes()
    reached: set[Layer] = set()
    for layer, lost in gaps(context.architecture, dropped).items():
        reached.update(lost)
        output = context.outputs.get(layer)
        if layer in mapped or output is None or output.slot is None:
            found |= _missed(lost, "a linear map is what is left before" if layer in mapped else _why(layer, output))
            continue
        sets = [key for key in known if key[0] == output.slot.path and key[1] <= set(lost)]
        if sets:
            one = known[max(sets, key=lambda key: len(key[1]))]
            found |= Changes(one.tensors)
            if not one.tensors:
                found |= _missed(lost, f"no change of {layer} before carries over to validation windows")
    return found | _missed([layer for layer in dropped if layer not in reached], "no branch is left before")


def _why(layer: Layer, output: BranchOutput | None) -> str:
    return f"{layer} before cannot be refitted in closed form, {output.reason if output else 'its output is not seen'}"


def _missed(layers: Sequence[Layer], why: str) -> Changes:
    return Changes(unrepaired=tuple((str(layer), why) for layer in layers))
