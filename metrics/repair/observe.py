"""Inputs of a block's slots and outputs of its branches, read while the block runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.metrics.blockwise.residuals import after_branch
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import with_parameters_of
from dropformer.metrics.repair.slots import BranchOutput, OutputProjection
from dropformer.prune.architecture import Layer, Tap
from dropformer.prune.discovery.proof import on_tap
from dropformer.prune.loading.skipped_modules import hidden_states


@dataclass
class Observation:
    """One batch's pass through a block.

    `stream`: its output [B, T, D].  `features` by slot path: a linear module's input [B, T, K], or a norm's output
    without its weight [B, T, D].  By layer: `added`, a branch's output, and `after`, the stream after it, [B, T, D].
    """

    stream: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    added: dict[Layer, Tensor] = field(default_factory=dict)
    after: dict[Layer, Tensor] = field(default_factory=dict)


def observe(
    runner: BlockRunner,
    block: int,
    batch: int,
    stream: Tensor,
    slots: Iterable[OutputProjection] = (),
    outputs: Mapping[Layer, BranchOutput] | None = None,
) -> Observation:
    """Run a block of the model as it is now, and read its slots and the outputs of some of its branches."""
    found, outputs = Observation(stream), outputs or {}
    parts = runner.blocks[block]
    branches = {Layer(b.kind, parts.index, runner.stack.name): b for b in parts.branches}
    wanted = {slot.layer: branches[slot.layer] for slot in slots} | {layer: branches[layer] for layer in outputs}
    taps: set[Tap] = {tap for b in wanted.values() for tap in (b.before, b.after, *b.delta) if tap}
    taps |= {tap for output in outputs.values() for tap, _ in output.taps}
    seen: dict[Tap, Tensor] = {}
    with ExitStack() as hooks:
        for tap in taps:
            hooks.callback(on_tap(runner.model, tap, partial(_note, seen, tap, parts.inplace)))
        for slot in slots:
            module = runner.model.get_submodule(slot.reads or slot.path)
            note = partial(_note_input, found.features, slot)
            hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        found.stream = runner.step(block, batch, stream)
    found.after = {layer: after_branch(branch, seen) for layer, branch in wanted.items()}
    for layer, output in outputs.items():
        found.added[layer] = _added(output, found.after[layer], seen[branches[layer].before], seen)
    return found


def _note(seen: dict[Tap, Tensor], tap: Tap, inplace: bool, value: Tensor) -> None:
    seen[tap] = value.clone() if inplace else value


def _note_input(
    features: dict[str, Tensor], slot: OutputProjection, module: nn.Module, args: tuple[Any, ...], kwargs: dict
) -> None:
    given = hidden_states(args, kwargs)
    features[slot.path] = given.clone() if slot.kind == "linear" else per_channel(module, given)


def per_channel(norm: nn.Module, given: Tensor) -> Tensor:
    """A norm's normalized input, which it multiplies by its weight w, or by 1 + w.  [..., D] -> [..., D]."""
    one, none = (
        with_parameters_of(norm, {"weight": torch.full_like(norm.get_parameter("weight"), value)}).forward(given)
        for value in (1.0, 0.0)
    )
    return one - none


def _added(output: BranchOutput, after: Tensor, before: Tensor, seen: Mapping[Tap, Tensor]) -> Tensor:
    """A branch's output, from its own taps if there are any: a difference of rounded streams is less exact."""
    if not output.taps:
        return after - before
    parts = [seen[tap].reshape(before.shape).to(before.device) * scale for tap, scale in output.taps]
    return sum(parts[1:], start=parts[0])
