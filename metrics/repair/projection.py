"""Find the linear module that writes a branch's output into the residual stream: o_proj, down_proj and their like."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.prune.architecture import Block, Branch, Layer
from dropformer.prune.discovery.proof import on_tap
from dropformer.prune.discovery.trace import outputs_of


@dataclass(frozen=True)
class OutputProjection:
    """A linear module whose output is what its branch adds to the stream.

    `reads`: the dense model's module that has the same input, where that is not the one at `path`.
    """

    layer: Layer
    path: str
    reads: str | None = None


def changed(module: nn.Module, change: Tensor, constant: float = 1.0) -> nn.Module:
    """A copy of a linear module with `change` [K, D] (or [K + 1, D] with its bias) added; the module stays."""
    weight, bias = module.weight, module.bias
    rows = change.to(weight.device, torch.float64)  # type: ignore[arg-type]
    step = rows[: len(rows) - (bias is not None)]
    new = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    new.weight = _parameter(weight, step if isinstance(module, Conv1D) else step.T)
    if bias is not None:
        new.bias = _parameter(bias, rows[-1] * constant)
    return new


def _parameter(old: Any, change: Tensor) -> nn.Parameter:
    return nn.Parameter((old.detach().double() + change).to(old.dtype).contiguous(), requires_grad=old.requires_grad)


def with_constant(z: Tensor, module: nn.Module, constant: float) -> Tensor:
    """A module's inputs with a constant column behind them where the module has a bias.  [..., K (+ 1)]."""
    return z if module.bias is None else torch.cat([z, torch.full_like(z[..., :1], constant)], -1)


def projections(runner: BlockRunner) -> dict[Layer, OutputProjection]:
    """The projection of every branch that has one; experts and branches that end in a norm have none.

    Costs one pass over the first batch's first window.
    """
    found: dict[Layer, OutputProjection] = {}
    with torch.inference_mode():
        stream = runner.start(0)
        for i, block in enumerate(runner.blocks):
            with watching(runner.model, block) as seen:
                stream = runner.step(i, 0, stream)
            for branch in block.branches:
                path = _last_linear(runner.model, block, branch, seen)
                if path:
                    layer = Layer(branch.kind, block.index, runner.stack.name)
                    found[layer] = OutputProjection(layer, path)
    return found


@contextmanager
def watching(model: nn.Module, block: Block) -> Iterator[dict[Any, Tensor]]:
    """Outputs of the block's linear modules by path in order of calls, and the stream at its taps."""
    seen: dict[Any, Tensor] = {}
    with ExitStack() as hooks:
        for tap in {t for b in block.branches for t in (b.before, b.after, *b.delta) if t}:
            hooks.callback(on_tap(model, tap, lambda value, tap=tap: seen.__setitem__(tap, value.clone())))
        for name, module in model.get_submodule(block.path).named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                hooks.callback(module.register_forward_hook(_note(seen, f"{block.path}.{name}")).remove)
        yield seen


def _note(seen: dict[Any, Tensor], path: str) -> Any:
    def note(_m: nn.Module, _args: tuple, output: Any) -> None:
        seen[path] = outputs_of(output)[None]

    return note


def _last_linear(model: nn.Module, block: Block, branch: Branch, seen: dict[Any, Tensor]) -> str | None:
    prefixes = tuple(f"{block.path}.{name}" for name in branch.modules)
    paths = [
        p for p in seen if isinstance(p, str) and (p in prefixes or p.startswith(tuple(f"{q}." for q in prefixes)))
    ]
    if branch.after:
        added, size = seen[branch.after] - seen[branch.before], seen[branch.after].abs().max()
    else:
        added, size = sum(seen[tap] for tap in branch.delta), seen[branch.before].abs().max()  # type: ignore[assignment]
    for path in reversed(paths):
        if seen[path].shape == added.shape and (seen[path] - added).abs().max() <= 1e-5 * size:
            return path
    return None


def scaled(module: nn.Module, factor: float) -> nn.Module:
    """A copy of a linear module that gives `factor` times as much; the module stays."""
    new = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    new.weight = _parameter(module.weight, module.weight.detach().double() * (factor - 1))  # type: ignore[operator]
    if module.bias is not None:
        new.bias = _parameter(module.bias, module.bias.detach().double() * (factor - 1))  # type: ignore[operator]
    return new
