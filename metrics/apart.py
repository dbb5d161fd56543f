"""Refit linear modules one by one on the dense model's own stream, all from a single forward pass.

A slot is a linear module that writes into the stream.  Where the next kept branch reads it, the stream lacks
what the dropped layers right behind the slot gave (and what stood in the slot's own place, for a linear map),
E; the module changes by the ridge fit of E on its dense inputs.  Slots do not see each other's errors, as
they do in `lockstep`; which of the two repairs better is not settled (LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from dropformer.metrics.lockstep import Refit
from dropformer.metrics.pairs import after_branch, reading_block
from dropformer.metrics.projection import Slot, changed, with_constant
from dropformer.metrics.ridge import PENALTIES, Sums, fit, token_weights
from dropformer.metrics.sites import Site, sites, target
from dropformer.metrics.stepping import Stepper
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.modeling import hidden_states

Progress = Callable[[int, int], None]


@dataclass
class Apart:
    """Sums for every slot from one pass of the dense model over fixed windows.

    `gone` layers have nothing in their place; `mapped` ones have a slot.  `groups` says which kind of text
    each batch is.  Time: one dense pass, K x K products for each slot and token, a K x K solve a slot.
    Memory: K x (K + D) numbers in float64 for each slot and group, and one batch's streams.
    """

    stepper: Stepper
    architecture: Architecture
    gone: Sequence[Layer]
    mapped: Sequence[Layer]
    groups: Sequence[int]
    penalties: Sequence[float] = PENALTIES
    fits: list[Refit] = field(default_factory=list)

    def refit(
        self, slots: Sequence[Slot], standing: dict[str, nn.Module], progress: Progress | None = None
    ) -> dict[str, nn.Module]:
        """The slots' modules (those in `standing`, else the model's), refitted where that carries over."""
        wanted = {slot.layer: slot for slot in slots}
        found = sites(self.architecture, self.stepper.stack, self.gone, wanted)
        aims = {site.layer: (site, target(found, n)) for n, site in enumerate(found) if site.layer in wanted}
        modules = {
            layer: standing.get(s.path) or self.stepper.model.get_submodule(s.path) for layer, s in wanted.items()
        }
        sums: dict[Layer, dict[int, Sums]] = {layer: {} for layer in aims}
        constants: dict[Layer, float] = {}
        with torch.inference_mode():
            for batch, group in enumerate(self.groups):
                inputs, streams = self._pass(batch, [wanted[layer] for layer in aims])
                for layer, (site, aim) in aims.items():
                    z, goal = inputs[layer], streams[aim.block, aim.key]
                    constants.setdefault(layer, float(z.square().mean().sqrt()))
                    lacking = goal - self._without(site, streams)
                    z = with_constant(z, modules[layer], constants[layer])
                    sums[layer].setdefault(group, Sums()).add(z, lacking, token_weights(goal))
                if progress:
                    progress(batch + 1, len(self.groups))
        return {
            wanted[layer].path: self._fit(wanted[layer], modules[layer], sums[layer], constants[layer])
            for layer in aims
        }

    def _fit(self, slot: Slot, module: nn.Module, sums: dict[int, Sums], constant: float) -> nn.Module:
        change, penalty, left_over = fit(list(sums.values()), self.penalties)
        self.fits.append(Refit(slot, penalty, left_over))
        return changed(module, change, constant) if left_over < 1 else module

    def _pass(
        self, batch: int, slots: Sequence[Slot]
    ) -> tuple[dict[Layer, Tensor], dict[tuple[int, str | None], Tensor]]:
        """The slots' inputs, and the stream at every site and before every branch, in the dense model."""
        inputs: dict[Layer, Tensor] = {}
        streams: dict[tuple[int, str | None], Tensor] = {}

        def see(layer: Layer, _m: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs[layer] = hidden_states(args, kwargs).clone()

        stream = self.stepper.start(batch)
        with ExitStack() as hooks:
            for slot in slots:
                module = self.stepper.model.get_submodule(slot.reads or slot.path)
                hooks.callback(module.register_forward_pre_hook(partial(see, slot.layer), with_kwargs=True).remove)
            for i, block in enumerate(self.stepper.blocks):
                with reading_block(self.stepper.model, block) as seen:
                    stream = self.stepper.step(i, batch, stream)
                streams[i, None] = stream
                for branch in block.branches:
                    streams[i, branch.kind] = after_branch(branch, seen)
                    streams[i, f"before {branch.kind}"] = seen[branch.before]
        return inputs, streams

    def _without(self, site: Site, streams: dict[tuple[int, str | None], Tensor]) -> Tensor:
        """The dense stream at a site, less what is dropped or mapped there."""
        stream = streams[site.block, site.key]
        lost = {
            b.kind for g in (*self.gone, *self.mapped) if g.index == site.block for b in self.architecture.branches(g)
        }
        kinds = lost if site.whole else lost & {site.branch.kind}
        for kind in kinds:
            stream = stream - (streams[site.block, kind] - streams[site.block, f"before {kind}"])
        return stream
