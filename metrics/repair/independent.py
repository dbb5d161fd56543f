"""Fit linear modules one by one on the dense model's own stream, whatever goes, all from a single forward pass.

A slot is a linear module that writes into the stream.  Where the layers right behind it go, the stream lacks
what they added, and the module changes by the ridge fit of that on its own dense inputs.  The moments of a
slot's inputs with what each layer behind it adds are enough to fit any gap, so that a search may ask for one
after the other.  Slots do not see each other's errors, as they do in `lockstep`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from dropformer.metrics.blockwise.residuals import after_branch, reading_block
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.repair.projection import OutputProjection, changed, with_constant
from dropformer.metrics.repair.ridge import PENALTIES, Group, MomentSums, fit, token_weights
from dropformer.metrics.repair.sequential import Refit
from dropformer.prune.architecture import Layer
from dropformer.prune.loading.modeling import hidden_states

Unit = tuple[Layer, ...]  # branches that go together: one layer's


@dataclass(frozen=True)
class RefitTarget:
    """A slot, the module in its place, and the units whose loss it can take over, nearest first."""

    slot: OutputProjection
    module: nn.Module
    units: tuple[Unit, ...]


@dataclass
class IndependentRefit:
    """Moments for every slot from one pass of the dense model over fixed windows.

    `batches`: which of the stepper's; `groups` says of each of these which kind of text it is, or
    that it judges.
    Time: one dense pass, K x (K + units x D) products a slot and token; a fit is a few K x K solves.
    Memory: K x (K + units x D) numbers in float64 a slot and group, and one batch's branches.
    """

    runner: BlockRunner
    reaches: Sequence[RefitTarget]
    batches: Sequence[int]
    groups: Sequence[Group]
    penalties: Sequence[float] = PENALTIES
    fits: list[Refit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sums: dict[str, dict[Group, MomentSums]] = {
            reach.slot.path: defaultdict(MomentSums) for reach in self.reaches
        }
        self._constants: dict[str, float] = {}
        self._fitted: dict[tuple[str, tuple[Unit, ...]], nn.Module] = {}
        with torch.inference_mode():
            for batch, group in zip(self.batches, self.groups, strict=True):
                self._add(batch, group)

    def module(self, reach: RefitTarget, lost: Sequence[Unit]) -> nn.Module:
        """The slot's module once these units of its reach are gone: refitted where that carries over."""
        key = reach.slot.path, tuple(lost)
        if key not in self._fitted:
            targets = [reach.units.index(unit) for unit in lost]
            change, penalty, left_over = fit(self._sums[reach.slot.path], self.penalties, targets)
            self.fits.append(Refit(reach.slot, penalty, left_over))
            constant = self._constants[reach.slot.path]
            self._fitted[key] = changed(reach.module, change, constant) if left_over < 1 else reach.module
        return self._fitted[key]

    def _add(self, batch: int, group: Group) -> None:
        inputs, added, streams = self._pass(batch)
        for reach in self.reaches:
            path, z = reach.slot.path, inputs[reach.slot.path]
            constant = self._constants.setdefault(path, float(z.square().mean().sqrt()))
            lost = [sum(added[layer] for layer in unit) for unit in reach.units]
            weight = token_weights(streams[reach.slot.layer])
            self._sums[path][group].add(with_constant(z, reach.module, constant), lost, weight)  # type: ignore[arg-type]

    def _pass(self, batch: int) -> tuple[dict[str, Tensor], dict[Layer, Tensor], dict[Layer, Tensor]]:
        """Each slot's input by path, what each branch adds to the dense stream, and the stream behind it."""
        inputs: dict[str, Tensor] = {}
        added: dict[Layer, Tensor] = {}
        streams: dict[Layer, Tensor] = {}

        def see(path: str, _m: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs[path] = hidden_states(args, kwargs).clone()

        stream = self.runner.start(batch)
        with ExitStack() as hooks:
            for slot in (reach.slot for reach in self.reaches):
                module = self.runner.model.get_submodule(slot.reads or slot.path)
                hooks.callback(module.register_forward_pre_hook(partial(see, slot.path), with_kwargs=True).remove)
            for i, block in enumerate(self.runner.blocks):
                with reading_block(self.runner.model, block) as seen:
                    stream = self.runner.step(i, batch, stream)
                for branch in block.branches:
                    layer = Layer(branch.kind, block.index, self.runner.stack.name)
                    streams[layer] = after_branch(branch, seen)
                    added[layer] = streams[layer] - seen[branch.before]
        return inputs, added, streams
