"""Refit linear modules of a pruned model, in order of depth, so that its stream comes out as the dense one's.

A slot is a linear module that writes into the stream.  Where the next kept branch reads it, the stream lacks
E = (dense stream there) - (stream without what was dropped), and the module changes by the ridge fit of E
on its own inputs.  Two ways to take inputs and errors:

    apart      both from the dense model: E is what the dropped layers right behind the slot gave
    lockstep   both from the pruned model as repaired so far: E also holds what earlier slots left
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dropformer.metrics.damage import dropped_modules
from dropformer.metrics.pairs import after_branch, reading_block
from dropformer.metrics.projection import Slot, changed, with_constant
from dropformer.metrics.ridge import PENALTIES, Sums, fit, token_weights
from dropformer.metrics.stepping import Stepper, replaced
from dropformer.prune.architecture import Architecture, Branch, Layer
from dropformer.prune.modeling import hidden_states

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Site:
    """A place in the stream: after this branch of this block, or after a parallel block as a whole."""

    block: int
    branch: Branch
    layer: Layer
    whole: bool


@dataclass(frozen=True)
class Refit:
    """What one slot's fit did: the penalty, and the share of the stream's error left on text of another kind."""

    slot: Slot
    penalty: float
    left_over: float


@dataclass
class Lockstep:
    """A model on fixed windows without the `gone` layers; `modules` stand in for others of its own.

    `apart`: fit each slot on the dense model's own stream.  That asks less of the calibration text, as
    accumulated errors are hard to predict: on 8,192 tokens eight linear maps gave 1.27 times the dense
    perplexity apart and 1.35 in lockstep (LOG.md).  `groups` says which kind of text each batch is.

    Time: one dense pass, another or a pruned one, one more for each block's slots, and a K x K solve a slot.
    Memory: four streams of all windows, N T D numbers each, and K x (K + D) in float64.
    """

    stepper: Stepper
    architecture: Architecture
    gone: Sequence[Layer]
    groups: Sequence[int]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    penalties: Sequence[float] = PENALTIES
    apart: bool = False
    fits: list[Refit] = field(default_factory=list)

    def refit(self, slots: Iterable[Slot], progress: Progress | None = None) -> dict[str, nn.Module]:
        """Everything that stands in for the model's modules, refitted ones included; the model does not change."""
        wanted = {slot.layer: slot for slot in slots}
        self.modules = dropped_modules(self.architecture, self.gone) | self.modules
        sites = self._sites(wanted)
        dense = _Dense(self.stepper)
        first = min([layer.index for layer in (*wanted, *self.gone)], default=len(self.stepper.blocks))
        with torch.inference_mode():
            streams = [dense.entering(batch, first) for batch in range(len(self.stepper))]
            for i in range(first, len(self.stepper.blocks)):
                for n, (site, _) in enumerate(sites):
                    if site.block == i and site.layer in wanted:
                        self._fit(wanted[site.layer], site, _target(sites, n), streams, dense)
                with replaced(self.stepper.model, {} if self.apart else self.modules):
                    streams = [self.stepper.step(i, batch, stream) for batch, stream in enumerate(streams)]
                if progress:
                    progress(i + 1 - first, len(self.stepper.blocks) - first)
        return self.modules

    def _sites(self, wanted: dict[Layer, Slot]) -> list[tuple[Site, bool]]:
        """Every site in order of depth, and whether something still writes there."""
        gone = {(g.index, b.kind) for g in self.gone for b in self.architecture.branches(g)}
        sites = []
        for i, block in enumerate(self.stepper.blocks):
            found = [Layer(b.kind, block.index, self.stepper.stack.name) for b in block.branches]
            lives = [layer in wanted or (layer.index, layer.kind) not in gone for layer in found]
            if block.parallel:  # its branches read one stream: one site, for the last slot
                last = max((n for n, layer in enumerate(found) if layer in wanted), default=0)
                sites.append((Site(i, block.branches[last], found[last], True), any(lives)))
                continue
            parts = zip(block.branches, found, lives, strict=True)
            sites += [(Site(i, branch, layer, False), alive) for branch, layer, alive in parts]
        return sites

    def _fit(self, slot: Slot, site: Site, target: Site, streams: list[Tensor], dense: _Dense) -> None:
        sums: dict[int, Sums] = {}
        constant: float | None = None
        for batch, stream in enumerate(streams):
            goal = dense.at(batch, target)
            with replaced(self.stepper.model, self._seen_by(slot, site)):
                module = self.stepper.model.get_submodule(slot.path)
                z, after = self._observe(site, module, batch, stream)
            constant = constant or float(z.square().mean().sqrt())
            group = sums.setdefault(self.groups[batch], Sums())
            group.add(with_constant(z, module, constant), goal - after, token_weights(goal))
        change, penalty, left_over = fit(list(sums.values()), self.penalties)
        if left_over < 1:
            self.modules[slot.path] = changed(module, change, constant or 1.0)
        self.fits.append(Refit(slot, penalty, left_over))

    def _seen_by(self, slot: Slot, site: Site) -> dict[str, nn.Module]:
        """What stands in while a slot is observed: apart, the slot itself, and in a parallel block what went there."""
        if not self.apart:
            return self.modules
        block = self.stepper.blocks[site.block].path + "."
        return {p: m for p, m in self.modules.items() if p == slot.path or (site.whole and p.startswith(block))}

    def _observe(self, site: Site, module: nn.Module, batch: int, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The module's input [B, T, K] and the stream at the site [B, T, D], in the pruned model."""
        inputs: list[Tensor] = []

        def see(_m: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs.append(hidden_states(args, kwargs))

        with ExitStack() as hooks:
            hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
            seen = hooks.enter_context(reading_block(self.stepper.model, self.stepper.blocks[site.block]))
            output = self.stepper.step(site.block, batch, stream)
        return inputs[-1], output if site.whole else after_branch(site.branch, seen)


def _target(sites: list[tuple[Site, bool]], n: int) -> Site:
    """The last site before the next one that something writes to: where the next kept branch reads."""
    end = next((k for k in range(n + 1, len(sites)) if sites[k][1]), len(sites))
    return sites[end - 1][0]


class _Dense:
    """The dense model's streams, asked for in order of depth; holds one block's a batch."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self._next = [0] * len(stepper)  # the block that runs next
        self._stream = [stepper.start(batch) for batch in range(len(stepper))]
        self._after: list[dict[str | None, Tensor]] = [{} for _ in range(len(stepper))]

    def entering(self, batch: int, block: int) -> Tensor:
        while self._next[batch] < block:
            self._run(batch)
        return self._stream[batch]

    def at(self, batch: int, site: Site) -> Tensor:
        while self._next[batch] <= site.block:
            self._run(batch)
        return self._after[batch][None if site.whole else site.branch.kind]

    def _run(self, batch: int) -> None:
        i = self._next[batch]
        block = self.stepper.blocks[i]
        with reading_block(self.stepper.model, block) as seen:
            output = self.stepper.step(i, batch, self._stream[batch])
        self._after[batch] = {b.kind: after_branch(b, seen) for b in block.branches} | {None: output}
        self._stream[batch], self._next[batch] = output, i + 1
