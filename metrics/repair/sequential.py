"""Sequential ridge refits of every slot after the first gap, so that the pruned stream follows the dense one.

The dense and the pruned model run side by side, block by block, on the same windows.  At each slot, a module that
writes into the residual stream, the error is E = (dense stream where the next kept branch reads it) - (pruned stream
there), and the slot changes by the ridge fit of E on its inputs in the pruned model.  Later slots correct the residual
errors of earlier ones, so errors do not compound; but these are hard to predict and need more calibration text than
`independent`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dropformer.metrics.blockwise.divergence import first_changed
from dropformer.metrics.blockwise.residuals import after_branch, reading_block
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import Changes, Variant, variant
from dropformer.metrics.repair.base import RepairContext
from dropformer.metrics.repair.gaps import all_slots
from dropformer.metrics.repair.independent import changed, inputs_of
from dropformer.metrics.repair.observe import Observation, observe
from dropformer.metrics.repair.ridge import PENALTIES, ChannelSums, Fit, Group, MomentSums, fit, token_weights
from dropformer.metrics.repair.slots import OutputProjection, projections
from dropformer.prune.architecture import Architecture, Branch, Layer, Stack
from dropformer.prune.loading.parts import replaced


def fit_all(context: RepairContext) -> Changes:
    """Refits of every slot from the one before the first gap on, on top of earlier repairs.

    Time: one dense pass and about one and a half pruned passes, both from the first gap on.
    """
    slots = {layer: slot for layer, slot in projections(context.outputs).items() if layer not in context.before.maps}
    dropped = context.outline.branch_layers(context.dropped)
    wanted = all_slots(context.architecture, dropped, slots)
    skipped = [layer for layer, output in context.outputs.items() if output.slot is None and layer not in dropped]
    why = tuple((str(layer), context.outputs[layer].reason) for layer in skipped)
    if not wanted:
        return Changes(unrepaired=why)
    refit = SequentialRefit(context.runner, context.architecture, context.branches, context.groups, context.before)
    found = refit.refit(wanted)
    if not found:
        why += tuple((str(slot.layer), "no change of it carries over to validation windows") for slot in wanted)
    return Changes(found, unrepaired=why)


@dataclass(frozen=True)
class StreamSite:
    """A place in the residual stream: after a branch, or after a parallel block as a whole.

    `alive`: a kept module still writes there.
    """

    block: int
    branch: Branch
    layer: Layer
    whole: bool
    alive: bool

    @property
    def key(self) -> tuple[int, str | None]:
        """The block, and the branch's kind or None for the block's end."""
        return self.block, None if self.whole else self.branch.kind


@dataclass(frozen=True)
class SequentialFit:
    """The penalty of one slot's fit, and the share of the stream's error left on validation windows."""

    slot: OutputProjection
    penalty: float
    left_over: float


@dataclass
class SequentialRefit:
    """Refits of a model on fixed windows without the `dropped` layers, with the changes in `before`.

    `groups`: per batch the domain to fit on, or None to validate on.  Time: one dense pass, per slot one pruned run of
    its block, and `ridge.fit`; a block's output after its last refit follows from that slot's inputs.  Memory: four
    streams of all windows, N T D numbers each, and a slot's inputs, N T K, which the keeper may move to files; the
    moments of one slot.
    """

    runner: BlockRunner
    architecture: Architecture
    dropped: Sequence[Layer]
    groups: Sequence[Group]
    before: Changes = field(default_factory=Changes)
    penalties: Sequence[float] = PENALTIES
    fits: list[SequentialFit] = field(default_factory=list)

    def refit(self, slots: Iterable[OutputProjection]) -> dict[str, Tensor]:
        """New parameters of the slots that change, by name; the model stays unchanged."""
        self._new: dict[str, Tensor] = {}
        wanted = {slot.layer: slot for slot in slots}
        places = sites(self.architecture, self.runner.stack, self.dropped, wanted)
        aims = {n: target(places, n) for n, site in enumerate(places) if site.layer in wanted}
        dense = DenseStreams(self.runner, {aim.key for aim in aims.values()})
        first = min(self._first_changed(), *(places[n].block for n in aims))
        last = max(places[n].block for n in aims)
        with torch.no_grad():
            dense.advance(first)
            streams = list(dense.streams)
            for block in range(first, last + 1):
                behind = None
                for n in [n for n in aims if places[n].block == block]:
                    dense.advance(aims[n].block + 1)
                    later = [s.layer for s in places[n + 1 :] if s.block == block and s.alive]
                    behind = self._fit(wanted[places[n].layer], places[n], dense.take(aims[n]), later, streams)
                if block < last:
                    streams = behind or self._step(block, streams)
        return self._new

    def _first_changed(self) -> int:
        return first_changed(self.runner, self._variant(()).paths)

    def _variant(self, later: Collection[Layer]) -> Variant:
        """The model with the repairs so far, also without the branches in `later`."""
        changes = self.before | Changes(self._new)
        return variant(self.runner.model, self.architecture, [*self.dropped, *later], changes)

    def _step(self, block: int, streams: Sequence[Tensor]) -> list[Tensor]:
        self.runner.provider.enter(self.runner.blocks[block].path)
        with replaced(self.runner.model, self._variant(()).modules(f"{self.runner.blocks[block].path}.")):
            keep = self.runner.keeper.keep
            return [keep(self.runner.step(block, batch, stream)) for batch, stream in enumerate(streams)]

    def _fit(
        self,
        slot: OutputProjection,
        site: StreamSite,
        goals: list[Tensor],
        later: Sequence[Layer],
        streams: Sequence[Tensor],
    ) -> list[Tensor] | None:
        """Refit a slot towards the dense stream at a site, without the later branches of its block.

        Returns the block's output streams if the slot is its last, so that the block need not run again.
        """
        path = self.runner.blocks[site.block].path
        self.runner.provider.enter(path)
        with replaced(self.runner.model, self._variant(later).modules(f"{path}.")):
            module = self.runner.model.get_submodule(slot.path)
            sums: dict[Group, MomentSums] = {}
            ends: list[tuple[Tensor, Tensor]] = []
            constant = 0.0
            for batch, stream in enumerate(streams):
                found = observe(self.runner, site.block, batch, stream, [slot])
                z, after = found.features[slot.path], _after(found, site)
                constant = constant or float(z.float().square().mean().sqrt())
                goal = goals[batch].to(after.device)
                lost = (goal.float() - after.float()) / slot.scale
                kind = MomentSums if slot.kind == "linear" else ChannelSums
                group = sums.setdefault(self.groups[batch], kind())
                weights = token_weights(goal, self.runner.counted[batch], self.runner.real(batch))
                group.add(inputs_of(slot, module, z, constant), [lost], weights)
                if not later and torch.equal(after, found.stream):
                    ends.append((self.runner.keeper.keep(z), self.runner.keeper.keep(after)))
            one = fit(sums, penalties=self.penalties, start=self._near(slot))[0]
            self.fits.append(SequentialFit(slot, one.penalty, one.left_over))
            return self._apply(slot, module, one, constant, ends if len(ends) == len(streams) else None)

    def _near(self, slot: OutputProjection) -> tuple[float, int] | None:
        """The penalty of the last slot of the same kind, and the direction in which to look for a better one."""
        before = [fit.penalty for fit in self.fits if fit.slot.layer.kind == slot.layer.kind]
        return (before[-1], (-1) ** len(before)) if before else None

    def _apply(
        self,
        slot: OutputProjection,
        module: nn.Module,
        one: Fit,
        constant: float,
        ends: list[tuple[Tensor, Tensor]] | None,
    ) -> list[Tensor] | None:
        """Keep the slot's new parameters; returns the streams after it if `ends` determine them."""
        if not one.helps:
            return None if ends is None else [after for _, after in ends]
        new = changed(slot, module, one, constant)
        steps = {name.rpartition(".")[2]: t.float() - module.get_parameter(name.rpartition(".")[2]).float()
                 for name, t in new.items()}  # fmt: skip
        self._new |= {name: self.runner.keeper.keep(tensor) for name, tensor in new.items()}
        if ends is None:
            return None
        keep, found = self.runner.keeper.keep, []
        for z, after in ends:
            added = slot.scale * written(slot, isinstance(module, Conv1D), steps, z.to(steps["weight"].device))
            found.append(keep((after.to(added.device).float() + added).to(after.dtype)))
        return found


def written(slot: OutputProjection, turned: bool, steps: dict[str, Tensor], z: Tensor) -> Tensor:
    """The change of a slot's output by a change of its parameters, in float32.  [B, T, K] -> [B, T, D]."""
    weight = steps["weight"]
    added = z.float() * weight if slot.kind == "norm" else z.float() @ (weight if turned else weight.T)
    return added + steps["bias"] if "bias" in steps else added


def _after(found: Observation, site: StreamSite) -> Tensor:
    return found.stream if site.whole else found.after[site.layer]


def sites(
    architecture: Architecture, stack: Stack, dropped: Sequence[Layer], wanted: Collection[Layer]
) -> list[StreamSite]:
    """Every site in order of depth; those of `dropped` layers are not alive, those of `wanted` ones are."""
    dead = {(d.index, b.kind) for d in dropped for b in architecture.branches(d)} - {(w.index, w.kind) for w in wanted}
    found = []
    for i, block in enumerate(stack.blocks):
        layers = [Layer(b.kind, block.index, stack.name) for b in block.branches]
        lives = [(layer.index, layer.kind) not in dead for layer in layers]
        if block.parallel:  # its branches read one stream, so it has one site
            last = max((n for n, layer in enumerate(layers) if layer in wanted), default=0)
            found.append(StreamSite(i, block.branches[last], layers[last], True, any(lives)))
            continue
        parts = zip(block.branches, layers, lives, strict=True)
        found += [StreamSite(i, branch, layer, False, alive) for branch, layer, alive in parts]
    return found


def target(found: Sequence[StreamSite], n: int) -> StreamSite:
    """The last site before the next one that is alive: where the next kept branch reads."""
    end = next((k for k in range(n + 1, len(found)) if found[k].alive), len(found))
    return found[end - 1]


class DenseStreams:
    """The dense model's streams at the current block, and those at wanted places until they are taken."""

    def __init__(self, runner: BlockRunner, places: Collection[tuple[int, str | None]]) -> None:
        self.runner, self.places, self.next = runner, places, 0
        self.streams = [runner.start(batch) for batch in range(len(runner))]
        self._at: dict[tuple[int, str | None], list[Tensor]] = {}

    def advance(self, end: int) -> None:
        """Run all batches through the remaining blocks before `end`."""
        keep = self.runner.keeper.keep
        for i in self.runner.walk(self.next, max(end, self.next)):
            block = self.runner.blocks[i]
            here = [place for place in self.places if place[0] == i]
            for batch, stream in enumerate(self.streams):
                with reading_block(self.runner.model, block) as seen:
                    output = self.runner.step(i, batch, stream)
                self.streams[batch] = keep(output)
                for place in here:
                    branch = block.branch(place[1]) if place[1] else None
                    value = output if branch is None else after_branch(branch, seen)
                    self._at.setdefault(place, []).append(keep(value))
            self.next = i + 1

    def take(self, site: StreamSite) -> list[Tensor]:
        """The streams of all batches at a passed site, which are released."""
        return self._at.pop(site.key)
