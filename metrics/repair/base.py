"""The interface of repairs: their context, the changes they return, and the result for a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.metrics.blockwise.gate import Gate
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import Changes, Variant, variant
from dropformer.metrics.calibration.batching import some_rows
from dropformer.metrics.offload.keeper import Keeper
from dropformer.metrics.offload.process_memory import shown
from dropformer.metrics.repair.ridge import Group
from dropformer.metrics.repair.slots import BranchOutput
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.block_map import BlockMap, attention_path, new_index, new_name
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import Outline
from dropformer.prune.plan import Plan

__all__ = [
    *("Changes", "Foresight", "ForesightMethod", "Gate", "Repair", "RepairContext", "RepairMethod", "Variant"),
    *("check_fitted", "reasons"),
]


@dataclass
class RepairContext:
    """Input of a repair.  The model is dense, and a repair leaves it unchanged.

    `runner`: the calibration windows in batches; `groups`: per batch the domain to fit on, or None to validate on;
    `fitted_on`: batches that no search has measured on.  `dropped`: dropped layers; `before`: changes of earlier
    repairs.  `outputs`: how each branch writes into the residual stream.  Tensors that are kept pass through `keeper`;
    long work reports by `tell` or counts its steps in `runner.work`.
    """

    runner: BlockRunner
    architecture: Architecture
    outline: Outline
    groups: Sequence[Group]
    fitted_on: Sequence[int]
    outputs: Mapping[Layer, BranchOutput]
    dropped: Sequence[Layer] = ()
    before: Changes = field(default_factory=Changes)
    tell: Callable[[str], None] = lambda text: None
    memory: dict[str, Any] = field(default_factory=dict)  # fits of a search that the repair reuses
    training: Mapping[str, int] = field(default_factory=dict)  # the settings of `registry.Training` that were given

    @property
    def model(self) -> nn.Module:
        return self.runner.model

    @property
    def keeper(self) -> Keeper:
        return self.runner.keeper

    @property
    def branches(self) -> list[Layer]:
        """The dropped branches (all of a dropped block's), without those replaced by maps."""
        return [layer for layer in self.outline.branch_layers(self.dropped) if layer not in self.before.maps]

    def in_steps(self, tokens: int) -> RepairContext:
        """The same windows in batches of about so many tokens, a window at least: what a step of training takes.

        Example: 16 windows of 512 tokens, one batch on a GPU, are 16 steps and not one.
        """
        batches: list[dict[str, Any]] = []
        counted: list[Tensor | None] = []
        origin: list[int] = []
        for n, (inputs, counts) in enumerate(zip(self.runner.batches, self.runner.counted, strict=True)):
            windows, length = inputs["input_ids"].shape
            for rows in torch.arange(windows).split(max(1, tokens // length)):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                batches.append(some_rows(inputs, part))
                counted.append(None if counts is None else counts[part])
                origin.append(n)
        if len(batches) == len(self.runner):
            return self
        runner = self.runner.like(batches, self.architecture)
        runner.counted = counted
        fitted = [i for i, n in enumerate(origin) if n in self.fitted_on]
        return replace(self, runner=runner, groups=[self.groups[n] for n in origin], fitted_on=fitted)

    def variant(self, changes: Changes | None = None) -> Variant:
        """The model without the dropped layers, with these changes (default: `before`)."""
        return variant(self.model, self.architecture, self.dropped, self.before if changes is None else changes)


RepairMethod = Callable[[RepairContext], Changes]
"""Fits one repair.  Its changes are added to those in `before` if they pass the gate."""

Foresight = Callable[[Sequence[Layer], Changes], Changes]
"""Changes for a set of dropped layers, on top of earlier changes, from fits made before a search over many sets."""

ForesightMethod = Callable[[RepairContext, Sequence[Layer], int], Foresight]
"""Fits a repair for any `count` of the candidates, in one pass over the model."""


def shuffled(count: int, seed: int) -> list[int]:
    """0 ... count - 1 in an order of its own for each seed: domains are mixed, so that none is learned last."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, warm_up: int) -> None:
    """Each group's learning rate at a step, of its `most`: linear warm-up, then cosine decay."""
    share = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = share * group["most"]


def check_fitted(plan: Plan, repair: Repair | None) -> None:
    """Raises PlanError where a plan has linear maps or constants for sinks, and nothing gives their numbers."""
    missing = [str(layer) for layer in plan.mapped if not repair or layer not in repair.mapped]
    paths = {layer: attention_path(plan.outline, layer) for layer in plan.folded}
    fitted = {name.rpartition(".")[0] for name in (repair.tensors if repair else ())}
    missing += [f"{layer}@{window}" for layer, window in plan.folded.items() if paths[layer] not in fitted]
    if missing:
        raise PlanError(
            f"{', '.join(missing)}: linear maps and folded sinks are fitted, and a plan does not hold the numbers; use "
            "`prune --model ... --plan ...`, or give the repair of dropformer.fit(model, plan)"
        )


def reasons(unrepaired: Sequence[tuple[str, str]]) -> list[str]:
    """One line per reason why layers were not repaired."""
    found: dict[str, list[str]] = {}
    for layer, why in unrepaired:
        found.setdefault(why, []).append(layer)
    return [f"{', '.join(layers)} not repaired: {why}" for why, layers in found.items()]


@dataclass(frozen=True)
class Repair:
    """New parameters of a pruned model, and the attention layers replaced by linear maps.

    `tensors`, `mapped`, `unrepaired`: as in `Changes`; `gates`: measurements on validation text.  `passes`: forward
    passes over the calibration windows for selection and repair; `extra_bytes`: peak memory beyond the model's.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    mapped: Mapping[Layer, Mapping[str, Any]] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()
    unrepaired: tuple[tuple[str, str], ...] = ()
    passes: float = 0.0
    extra_bytes: int = 0

    @property
    def cost(self) -> str:
        """The cost of selection and repair as a line."""
        beside = f" and at most {shown(self.extra_bytes)} beside the model" if self.extra_bytes else ""
        return f"choosing and repairing took {self.passes:.1f} forward passes over the calibration windows{beside}"

    def named(self, outline: Outline, block_map: BlockMap) -> dict[str, Tensor]:
        """The tensors by the pruned model's parameter names."""
        maps = {
            f"{outline.stack(layer.stack).path}.{layer.index}.{module}": (layer, module)
            for layer, forms in self.mapped.items()
            for module in forms
        }
        found: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            owner, _, leaf = name.rpartition(".")
            if owner in maps:
                layer, module = maps[owner]
                new = f"{outline.stack(layer.stack).path}.{new_index(block_map, layer)}.{module}.{leaf}"
            else:
                new = new_name(outline, block_map, name) or ""
            if new:
                found[new] = tensor
        return found
