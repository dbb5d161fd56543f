"""What healing learns beside frozen weights: low-rank changes of linear modules, and norms, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from dropformer.prune.loading.parts import shared_parameters
from dropformer.prune.loading.skipped_modules import Skipped

SCALE = 2.0  # of a low-rank change, as alpha = 2 rank in LoRA
FLOOR = 1e-2  # the least root mean square that is assumed of a norm's weight


class Around(nn.Module):
    """Something around a module, for which it stands where a model asks that for its weight."""

    module: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class Adapter(Around):
    """A linear module with a low-rank change beside it, Wx + SCALE B A x: random A [rank, in], zero B [out, rank]."""

    def __init__(self, module: nn.Module, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        weight: Tensor = module.get_parameter("weight")
        outer, inner = weight.T.shape if isinstance(module, Conv1D) else weight.shape
        draw = torch.rand(rank, inner, generator=generator) * 2 - 1
        self.module = module
        self.down = nn.Parameter((draw * inner**-0.5).to(weight.device))
        self.up = nn.Parameter(torch.zeros(outer, rank, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.module(x) + (x.float() @ self.down.T @ (SCALE * self.up.T)).to(x.dtype)

    def learned(self, rate: float, norms: float) -> list[dict[str, Any]]:
        """What is learned, with its highest learning rate."""
        return [{"params": [self.down, self.up], "most": rate}]

    def merged(self) -> dict[str, Tensor]:
        """The module's parameters with the change in them, in their dtype."""
        weight = self.module.get_parameter("weight").detach()
        step = SCALE * self.up.detach() @ self.down.detach()
        step = step.T if isinstance(self.module, Conv1D) else step
        return {"weight": (weight.float() + step).to(weight.dtype).contiguous()}


class Shift(Around):
    """A norm whose parameters, a number a channel each, change by `steps`, zero at first."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.steps = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros_like(p, dtype=torch.float32)) for name, p in module.named_parameters()}
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, self._shifted(), args, kwargs)

    def _shifted(self) -> dict[str, Tensor]:
        return {name: (p.detach().float() + self.steps[name]).to(p.dtype) for name, p in self.module.named_parameters()}

    def learned(self, rate: float, norms: float) -> list[dict[str, Any]]:
        """What is learned, with its highest learning rate."""
        sizes = {name: float(p.detach().float().square().mean().sqrt()) for name, p in self.module.named_parameters()}
        return [{"params": [p], "most": norms * max(sizes[name], FLOOR)} for name, p in self.steps.items()]

    def merged(self) -> dict[str, Tensor]:
        return {name: value.detach().contiguous() for name, value in self._shifted().items()}


def adapters(model: nn.Module, blocks: Sequence[str], rank: int) -> dict[str, Adapter | Shift]:
    """Module path -> an adapter for each linear module and each norm in the blocks at these paths.

    Not for what is in the place of a dropped module, nor for weights that have several places.
    """
    several = shared_parameters(model)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Adapter | Shift] = {}
    for path, module in _modules(model, blocks):
        if any(id(p) in several for p in module.parameters()):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            found[path] = Adapter(module, rank, generator)
        elif _is_norm(module):
            found[path] = Shift(module)
    return found


def _modules(model: nn.Module, blocks: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    for block in blocks:
        inside = dict(model.get_submodule(block).named_modules(prefix=block))
        skipped = tuple(f"{path}." for path, module in inside.items() if isinstance(module, Skipped))
        yield from ((path, module) for path, module in inside.items() if not f"{path}.".startswith(skipped))


def _is_norm(module: nn.Module) -> bool:
    """Has it a weight of one number a channel, perhaps a bias too, and nothing else?"""
    own = dict(module.named_parameters())
    return "weight" in own and set(own) <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())
