"""Independent ridge refits of slots from one dense forward pass.

A slot is a module that writes into the residual stream.  If the layers after it are dropped, it changes by the ridge
fit of their outputs on its own dense inputs.  All windows pass a block before the next one; a slot's inputs are held
until the last of those layers has run, then its moments are summed, solved and freed before the next slot's.  Slots do
not see each other's errors; in `sequential` they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dropformer.metrics.blockwise.provider import InMemory
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import with_parameters_of
from dropformer.metrics.repair.observe import Observation, observe
from dropformer.metrics.repair.ridge import PENALTIES, ChannelSums, Fit, Group, MomentSums, fit, token_weights
from dropformer.metrics.repair.slots import BranchOutput, OutputProjection
from dropformer.prune.architecture import Layer

Unit = tuple[Layer, ...]  # branches that are dropped together


@dataclass(frozen=True)
class RefitTarget:
    """A slot, the units that it can compensate, nearest first, and the sets of them to fit (indices into `units`).

    `module` is fitted in place of the model's own module at the slot.
    """

    slot: OutputProjection
    units: tuple[Unit, ...]
    wanted: tuple[tuple[int, ...], ...]
    module: nn.Module | None = None

    @property
    def last(self) -> int:
        """The last block that the fit needs."""
        return max(self.slot.layer.index, *(layer.index for unit in self.units for layer in unit))


@dataclass(frozen=True)
class SlotFit:
    """New parameters of a slot, in its dtype; none if no change helps on validation windows."""

    tensors: Mapping[str, Tensor]
    penalty: float
    left_over: float


@dataclass
class IndependentRefit:
    """Fits every target in one pass of the dense model over some batches.

    `fits`: by slot path and set of dropped layers.  Time: one dense forward pass up to the last target, K (K + units D)
    products per slot and token, and `ridge.fit`.  Memory: the streams and the inputs of open slots (at most three if
    units are blocks), which the keeper may move to files, and the moments of one slot.
    """

    runner: BlockRunner
    outputs: Mapping[Layer, BranchOutput]
    batches: Sequence[int]
    groups: Sequence[Group]
    penalties: Sequence[float] = PENALTIES
    fits: dict[tuple[str, frozenset[Layer]], SlotFit] = field(default_factory=dict)
    _near: dict[str, tuple[float, int]] = field(default_factory=dict)  # kind -> last penalty, next direction

    def run(self, targets: Iterable[RefitTarget]) -> None:
        """Fit these targets in one pass."""
        waiting = sorted(targets, key=lambda target: target.slot.layer.index)
        if not waiting:
            return
        opened: list[_Open] = []
        streams = [self.runner.start(batch) for batch in self.batches]
        with torch.no_grad():
            for block in self.runner.walk(0, max(target.last for target in waiting) + 1):
                opened += [_Open(t, self._own(t)) for t in waiting if t.slot.layer.index == block]
                for n, batch in enumerate(self.batches):
                    streams[n] = self.runner.keeper.keep(self._observe(block, batch, streams[n], opened))
                for done in [o for o in opened if o.target.last == block]:
                    self._close(done)
                    opened.remove(done)

    def _own(self, target: RefitTarget) -> nn.Module:
        """The module of a slot, with a copy of its weights if the next block replaces them."""
        module = target.module or self.runner.model.get_submodule(target.slot.path)
        if target.module is None and not isinstance(self.runner.provider, InMemory):
            return _detached(module, self.runner.keeper.keep)
        return module

    def _observe(self, block: int, batch: int, stream: Tensor, opened: Sequence[_Open]) -> Tensor:
        slots = [o.target.slot for o in opened if o.target.slot.layer.index == block]
        lost = {layer for o in opened for unit in o.target.units for layer in unit if layer.index == block}
        outputs = {layer: self.outputs[layer] for layer in lost}
        found = observe(self.runner, block, batch, stream, slots, outputs)
        for one in opened:
            one.note(found, self.runner, batch)
        return found.stream

    def _close(self, done: _Open) -> None:
        slot = done.target.slot
        sums = done.sums(self.groups)
        found = fit(sums, done.target.wanted, self.penalties, self._near.get(slot.layer.kind))
        sums.clear()
        self._near[slot.layer.kind] = found[0].penalty, -self._near.get(slot.layer.kind, (0.0, 1))[1]
        for chosen, one in zip(done.target.wanted, found, strict=True):
            lost = frozenset(layer for i in chosen for layer in done.target.units[i])
            tensors = changed(slot, done.module, one, done.constant) if one.helps else {}
            kept = {name: self.runner.keeper.keep(tensor) for name, tensor in tensors.items()}
            self.fits[slot.path, lost] = SlotFit(kept, one.penalty, one.left_over)


class _Open:
    """A target during the pass: its inputs and its units' outputs per batch."""

    def __init__(self, target: RefitTarget, module: nn.Module) -> None:
        self.target, self.module = target, module
        self.constant = 0.0
        self._z: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._added: list[dict[int, Tensor]] = []
        self._at: dict[Layer, int] = {}

    def note(self, found: Observation, runner: BlockRunner, batch: int) -> None:
        """Add one batch's observation; batches come in the same order in every block."""
        keep = runner.keeper.keep
        slot = self.target.slot
        if slot.path in found.features:
            z = found.features[slot.path]
            self.constant = self.constant or float(z.float().square().mean().sqrt())
            self._z.append(keep(z))
            self._weights.append(token_weights(found.after[slot.layer], runner.counted[batch], runner.real(batch)))
            self._added.append({})
        for layer in [layer for unit in self.target.units for layer in unit if layer in found.added]:
            place = self._at.get(layer, 0)
            self._at[layer] = place + 1
            for i in [i for i, unit in enumerate(self.target.units) if layer in unit]:
                so_far = self._added[place].get(i)
                added = found.added[layer]
                self._added[place][i] = keep(added if so_far is None else so_far.to(added.device) + added)

    def sums(self, groups: Sequence[Group]) -> dict[Group, MomentSums]:
        """The moments of each group; held tensors are released on the way."""
        slot, found = self.target.slot, dict[Group, MomentSums]()
        for group in groups:
            weight, added = self._weights.pop(0), self._added.pop(0)
            z = self._z.pop(0).to(weight.device)
            targets = [added[i] / slot.scale for i in range(len(self.target.units))]
            kind = MomentSums if slot.kind == "linear" else ChannelSums
            found.setdefault(group, kind()).add(inputs_of(slot, self.module, z, self.constant), targets, weight)
        return found


def inputs_of(slot: OutputProjection, module: nn.Module, z: Tensor, constant: float) -> Tensor:
    """A slot's features for a fit, with a constant feature if the module has a bias.

    [..., K (+ 1)] of a linear module, [..., D, 1 (+ 1)] of a norm.
    """
    biased = module.bias is not None if hasattr(module, "bias") else False
    if slot.kind == "norm":
        parts = [z, torch.full_like(z, constant)] if biased else [z]
        return torch.stack(parts, -1)
    return torch.cat([z, torch.full_like(z[..., :1], constant)], -1) if biased else z


def changed(slot: OutputProjection, module: nn.Module, found: Fit, constant: float = 1.0) -> dict[str, Tensor]:
    """Full parameter name -> the new value, in the module's dtype."""
    steps, own = {}, dict(module.named_parameters(recurse=False))
    change = found.change
    if slot.kind == "norm":  # [D, 1 (+ 1), 1]
        steps["weight"] = change[:, 0, 0]
        if "bias" in own:
            steps["bias"] = change[:, 1, 0] * constant
    else:  # [K (+ 1), D]
        rows = change[:-1] if "bias" in own else change
        steps["weight"] = rows if isinstance(module, Conv1D) else rows.T
        if "bias" in own:
            steps["bias"] = change[-1] * constant
    return {
        f"{slot.path}.{name}": (own[name].detach().to(step.device).float() + step).to(own[name].dtype).contiguous()
        for name, step in steps.items()
    }


def _detached(module: nn.Module, keep: Callable[[Tensor], Tensor]) -> nn.Module:
    return with_parameters_of(module, {name: keep(p.clone()) for name, p in module.named_parameters(recurse=False)})
