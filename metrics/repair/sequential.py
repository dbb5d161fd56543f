"""Refit linear modules of a pruned model, in order of depth, so that its stream follows the dense one.

The dense and the pruned model run side by side, one block at a time, on the same windows.  At each slot, a
linear module that writes into the stream, the error so far is E = (dense stream where the next kept branch
reads it) - (pruned stream there), and the module changes by the ridge fit of E on its inputs in the pruned
model.  Later slots see what earlier ones left, so errors do not compound; but what they left is hard to
predict, and needs more calibration text than `apart` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dropformer.metrics.blockwise.divergence import dropped_modules, first_changed
from dropformer.metrics.blockwise.residuals import after_branch, reading_block
from dropformer.metrics.blockwise.runner import BlockRunner, replaced
from dropformer.metrics.repair.projection import OutputProjection, changed, with_constant
from dropformer.metrics.repair.ridge import PENALTIES, Group, MomentSums, fit, token_weights
from dropformer.metrics.repair.sites import StreamSite, sites, target
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.discovery.trace import outputs_of
from dropformer.prune.loading.modeling import hidden_states

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Refit:
    """What one slot's fit did: the penalty, and the share of the stream's error left on text of another kind."""

    slot: OutputProjection
    penalty: float
    left_over: float


@dataclass
class SequentialRefit:
    """A model on fixed windows without the `gone` layers; `modules` stand in for others of its own.

    `groups` says of each batch which kind of text it is, or that it judges.

    Time: one dense pass, one pruned one up to each slot, and a K x K solve a slot: what a block's last slot
    saw tells what the block gives once it is refitted.
    Memory: four streams of all windows, N T D numbers each, a slot's inputs, N T K, and K x (K + D) in float64.
    """

    runner: BlockRunner
    architecture: Architecture
    gone: Sequence[Layer]
    groups: Sequence[Group]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    penalties: Sequence[float] = PENALTIES
    fits: list[Refit] = field(default_factory=list)

    def refit(self, slots: Iterable[OutputProjection], progress: Progress | None = None) -> dict[str, nn.Module]:
        """Everything that stands in for the model's modules, refitted ones included; the model does not change."""
        wanted = {slot.layer: slot for slot in slots}
        self.modules = dropped_modules(self.architecture, self.gone) | self.modules
        found = sites(self.architecture, self.runner.stack, self.gone, wanted)
        dense = _Dense(self.runner)
        first = first_changed(self.runner, [*self.modules, *(slot.path for slot in wanted.values())])
        with torch.no_grad():  # not inference mode: what is refitted here may be trained later
            streams = [dense.entering(batch, first) for batch in range(len(self.runner))]
            for i in range(first, len(self.runner.blocks)):
                behind = None
                for n, site in enumerate(found):
                    if site.block == i and site.layer in wanted:
                        later = [other.layer for other in found[n + 1 :] if other.block == i and other.alive]
                        behind = self._fit(wanted[site.layer], (site, target(found, n)), later, streams, dense)
                streams = behind or self._step(i, streams)
                if progress:
                    progress(i + 1 - first, len(self.runner.blocks) - first)
        return self.modules

    def _step(self, block: int, streams: Sequence[Tensor]) -> list[Tensor]:
        with replaced(self.runner.model, self.modules):
            return [self.runner.step(block, batch, stream) for batch, stream in enumerate(streams)]

    def _fit(
        self,
        slot: OutputProjection,
        where: tuple[StreamSite, StreamSite],
        later: Sequence[Layer],
        streams: Sequence[Tensor],
        dense: _Dense,
    ) -> list[Tensor] | None:
        """Refit a slot at one site towards another, without running the branches of its block that come later.

        Gives the streams behind the block where nothing comes later, so that the block need not run again.
        """
        site, aim = where
        module = self.modules.get(slot.path) or self.runner.model.get_submodule(slot.path)
        standing = self.modules | dropped_modules(self.architecture, later)
        sums: dict[Group, MomentSums] = {}
        constant: float | None = None
        ends: list[tuple[Tensor, Tensor]] = []
        for batch, stream in enumerate(streams):
            with replaced(self.runner.model, standing):
                z, after, output = self._observe(site, module, batch, stream)
            goal = dense.at(batch, aim)
            constant = constant or float(z.square().mean().sqrt())
            group = sums.setdefault(self.groups[batch], MomentSums())
            group.add(with_constant(z, module, constant), [goal - after], token_weights(goal))
            if not later and torch.equal(after, output):
                ends.append((z, after))
        change, penalty, left_over = fit(sums, self.penalties)
        self.fits.append(Refit(slot, penalty, left_over))
        new = module
        if left_over < 1:
            new = self.modules[slot.path] = changed(module, change, constant or 1.0)
        if len(ends) < len(streams):
            return None
        return [after + written(new, z) - written(module, z) for z, after in ends]

    def _observe(
        self, site: StreamSite, module: nn.Module, batch: int, stream: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The module's input [B, T, K], the stream at the site and the block's output [B, T, D]."""
        inputs: list[Tensor] = []

        def see(_m: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs.append(hidden_states(args, kwargs))

        with ExitStack() as hooks:
            hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
            seen = hooks.enter_context(reading_block(self.runner.model, self.runner.blocks[site.block]))
            output = self.runner.step(site.block, batch, stream)
        return inputs[-1], output if site.whole else after_branch(site.branch, seen), output


def written(module: nn.Module, z: Tensor) -> Tensor:
    """What a slot's module makes of its input.  [B, T, K] -> [B, T, D]."""
    return next(value for value in outputs_of(module(z)).values() if isinstance(value, Tensor))


class _Dense:
    """The dense model's streams, asked for in order of depth; holds one block's a batch."""

    def __init__(self, runner: BlockRunner) -> None:
        self.runner = runner
        self._next = [0] * len(runner)  # the block that runs next
        self._stream = [runner.start(batch) for batch in range(len(runner))]
        self._after: list[dict[str | None, Tensor]] = [{} for _ in range(len(runner))]

    def entering(self, batch: int, block: int) -> Tensor:
        while self._next[batch] < block:
            self._run(batch)
        return self._stream[batch]

    def at(self, batch: int, site: StreamSite) -> Tensor:
        while self._next[batch] <= site.block:
            self._run(batch)
        return self._after[batch][site.key]

    def _run(self, batch: int) -> None:
        i = self._next[batch]
        block = self.runner.blocks[i]
        with reading_block(self.runner.model, block) as seen:
            output = self.runner.step(i, batch, self._stream[batch])
        self._after[batch] = {b.kind: after_branch(b, seen) for b in block.branches} | {None: output}
        self._stream[batch], self._next[batch] = output, i + 1
