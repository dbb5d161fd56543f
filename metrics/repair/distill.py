"""Blockwise distillation around each gap, in order of depth, so that the pruned stream follows the dense one.

The dense and the pruned model run side by side, block by block, on the same windows.  A block that lost a branch,
precedes a gap or follows a dropped block is trained to map its pruned input stream to the dense stream where the next
kept branch reads it, so errors of earlier blocks do not compound.  Gradients stay within one block and reach what
closed-form refits do not: experts, norms after a projection, and everything before the projection.  Puzzle (arXiv
2411.19146) also distils replaced layers one by one, on the dense stream.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dropformer.metrics.blockwise.divergence import first_changed
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.repair.base import Changes, RepairContext, set_rate, shuffled
from dropformer.metrics.repair.ridge import token_weights
from dropformer.metrics.repair.sequential import DenseStreams, StreamSite, sites, target
from dropformer.prune.architecture import Architecture, Layer, Stack
from dropformer.prune.discovery.replay import picked
from dropformer.prune.discovery.trace import outputs_of
from dropformer.prune.loading.device import OVERRIDES
from dropformer.prune.loading.parts import replaced, shared_parameters


@dataclass(frozen=True)
class Distilling:
    """Training settings.

    `rate`: the largest step of a weight, relative to its tensor's root mean square, which is taken as at least
    `floor`.  `epochs`: passes over the windows to fit on (None: see `passes`).  `tokens`: of a step, a window at
    least.  `spent`: forward passes of the whole model that training may take where more of it helps.
    """

    epochs: int | None = None
    steps: int = 96
    tokens: int = 512
    rate: float = 5e-3
    warm_up: int = 8
    floor: float = 1e-2
    spent: float = 3.0

    def passes(self, batches: int, share: float = 1.0) -> int:
        """Passes over so many batches, one batch per step, where this share of the model's blocks is trained.

        Two; as many as make `steps` steps; or up to four where few blocks are trained.  For example 4 of 18 blocks,
        64 windows: a pass takes 3 * 4 / 18 forward passes of the model, so four fit into `spent`.
        """
        if self.epochs is not None:
            return self.epochs
        return max(2, -(-self.steps // max(1, batches)), min(4, int(self.spent / (3 * share))))


def fit_blocks(context: RepairContext, how: Distilling | None = None) -> Changes:
    """Train the blocks around the gaps, on top of earlier repairs.

    Time: a dense and a pruned pass from the first of them on, and per trained block and epoch three of its forward
    passes.  Memory: four streams of all windows, which the keeper may move to files, 20 bytes per parameter of one
    block, and the activations of one batch.
    """
    how = how or Distilling(context.training.get("epochs"))
    context = context.in_steps(how.tokens)
    touched = [g.index for g in context.dropped]
    found = aims(context.architecture, context.runner.stack, context.branches, touched)
    distillation = BlockDistillation(context, how, found)
    tensors = distillation.run() if found else {}
    missed = {f"{kind}:{i}": why for (kind, i), why in distillation.missed.items()}
    return Changes(tensors, unrepaired=tuple(missed.items()))


def aims(
    architecture: Architecture, stack: Stack, dropped: Sequence[Layer], touched: Iterable[int] = ()
) -> dict[int, StreamSite]:
    """Block to train -> its target site in the dense stream, by depth.

    Trained are blocks that lost some of their branches, blocks before a gap, those behind a whole block's, and
    `touched` ones.  Example, attention 5 and all of block 8 dropped: the target of block 4 is after attention 5, of
    block 5 after block 5, of block 7 after block 8, of block 9 after block 9.
    """
    places = sites(architecture, stack, dropped, ())
    found = {site.block: target(places, n) for n, site in enumerate(places) if site.alive}  # a block's last one wins
    lost = {place.block for place in places if not place.alive} | set(touched)
    lost |= {min(later) for gone in lost - found.keys() if (later := [block for block in found if block > gone])}
    return {block: aim for block, aim in found.items() if block in lost or aim.block != block}


@dataclass
class BlockDistillation:
    """Blocks trained in order of depth.  `places`: block to train -> its target site in the dense stream.

    `errors`: per trained block the relative squared error of its output on validation windows, before and after.
    """

    context: RepairContext
    how: Distilling
    places: Mapping[int, StreamSite]
    errors: dict[int, tuple[float, float]] = field(default_factory=dict)
    missed: dict[tuple[str, int], str] = field(default_factory=dict)

    def run(self) -> dict[str, Tensor]:
        """New parameters of the blocks that improve on validation windows, by name; the model stays unchanged."""
        runner, new = self.context.runner, dict[str, Tensor]()
        student = self.context.variant()
        dense = DenseStreams(runner, {place.key for place in self.places.values()})
        first = min(first_changed(runner, student.paths), *self.places)
        with torch.no_grad():
            dense.advance(first)
        streams = list(dense.streams)
        for block in runner.walk(first, max(self.places) + 1):
            path = runner.blocks[block].path
            with replaced(runner.model, student.modules(f"{path}.")):
                module = _copy(runner.model.get_submodule(path))
            if block in self.places:
                with torch.no_grad():
                    dense.advance(self.places[block].block + 1)
                new |= self._train(block, module, streams, dense.take(self.places[block]))
            if block < max(self.places):
                with torch.no_grad():
                    streams = [
                        runner.keeper.keep(run_block(runner, block, module, b, x).to(x.dtype))
                        for b, x in enumerate(streams)
                    ]
        return new

    def _train(
        self, block: int, module: nn.Module, streams: Sequence[Tensor], goals: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Train one block in place, keeping the best state on validation windows; {} if none improves."""
        path = self.context.runner.blocks[block].path
        learned = trainable(module, self.context.model, path)
        lesson = Lesson(self.context.runner, block, module, streams, goals)
        fit_on = [b for b, group in enumerate(self.context.groups) if group is not None] or list(range(len(streams)))
        held = [b for b, group in enumerate(self.context.groups) if group is None]
        validation = held or fit_on
        if not learned:
            self.missed["block", block] = "none of its parameters are its own floating-point numbers"
            return {}
        best = before = lesson.error(validation)
        kept = {name: p.detach().clone() for name, p in learned.items()}
        passes = self.how.passes(len(fit_on), len(self.places) / len(self.context.runner.blocks))
        for _ in lesson.epochs(learned, fit_on, self.how, passes):
            if (now := lesson.error(validation)) < best:
                best = now
                for name, p in learned.items():
                    kept[name].copy_(p.detach())
        with torch.no_grad():
            for name, p in learned.items():
                p.copy_(kept[name])
        self.errors[block] = before, best
        where = "validation windows" if held else "the windows that it is trained on, as there are no others"
        self.context.tell(f"distill: block {block}, error {before:.4f} -> {best:.4f} on {where}")
        if best >= before:
            return {}
        keep = self.context.runner.keeper.keep
        dtype = {name: self._dtype(f"{path}.{name}", p) for name, p in learned.items()}
        return {f"{path}.{name}": keep(p.detach().to(dtype[name]).clone()) for name, p in learned.items()}

    def _dtype(self, name: str, default: Tensor) -> torch.dtype:
        try:
            return self.context.model.get_parameter(name).dtype
        except AttributeError:
            return self.context.before.tensors[name].dtype


@dataclass
class Lesson:
    """One block with its input and target streams per batch, [B, T, D] in the model's dtype."""

    runner: BlockRunner
    block: int
    module: nn.Module
    streams: Sequence[Tensor]
    goals: Sequence[Tensor]

    def loss(self, batch: int) -> Tensor:
        """The squared error of the block's output relative to the target, tokens weighted as in a refit."""
        given = run_block(self.runner, self.block, self.module, batch, self.streams[batch]).float()
        masks = self.runner.counted[batch], self.runner.real(batch)
        return relative_error(given, self.goals[batch].to(given.device), *masks)

    def error(self, batches: Sequence[int]) -> float:
        with torch.no_grad():
            return sum(float(self.loss(batch)) for batch in batches) / len(batches)

    def epochs(
        self, learned: Mapping[str, nn.Parameter], batches: Sequence[int], how: Distilling, epochs: int
    ) -> Iterator[int]:
        """Train, one batch per step, domains shuffled; yields after each epoch."""
        optimizer = scaled_adam(learned.values(), how.rate, how.floor)
        for epoch in range(epochs):
            for n, k in enumerate(shuffled(len(batches), epoch)):
                set_rate(optimizer, epoch * len(batches) + n, epochs * len(batches), how.warm_up)
                with torch.enable_grad():
                    self.loss(batches[k]).backward()
                nn.utils.clip_grad_norm_(learned.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            yield epoch


def scaled_adam(parameters: Iterable[nn.Parameter], rate: float, floor: float) -> torch.optim.Optimizer:
    """Adam whose steps are relative to each tensor's root mean square."""
    groups = []
    for p in parameters:
        most = rate * max(float(p.detach().float().square().mean().sqrt()), floor)
        groups.append({"params": [p], "lr": most, "most": most})
    return torch.optim.Adam(groups, betas=(0.9, 0.95))


def relative_error(given: Tensor, goal: Tensor, counted: Tensor | None = None, real: Tensor | None = None) -> Tensor:
    """E w|x - y|^2 / E w|y|^2 for streams x, y [B, T, D], w: `token_weights` of y."""
    weight = token_weights(goal, counted, real)
    goal = goal.float()
    return (weight * (given - goal).square().sum(-1)).sum() / (weight * goal.square().sum(-1)).sum()


def run_block(runner: BlockRunner, block: int, module: nn.Module, batch: int, stream: Tensor) -> Tensor:
    """A block in float32 on one batch, under autocast on a GPU.  [B, T, D] -> [B, T, D]."""
    found = runner.blocks[block]
    device = next((p.device for p in module.parameters()), stream.device)
    runner.work.add(found.path, module, stream.shape[:2].numel() * (3 if torch.is_grad_enabled() else 1))
    args, kwargs = tree_map(partial(_free, device), runner.arguments(block, batch, stream.to(device)))
    quick: AbstractContextManager = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    with quick:
        return picked(outputs_of(module(*args, **kwargs)), found.output.key)


def _free(device: torch.device, value: Any) -> Any:
    """A tensor for training on the block's device: floating-point ones in float32."""
    if not isinstance(value, Tensor):
        return value
    value = (value.float() if value.is_floating_point() else value).to(device)
    return value.clone() if value.is_inference() else value


def _copy(block: nn.Module) -> nn.Module:
    """A copy of a block in float32, without gradients yet."""
    hooks = [module.__dict__.get(name) for module in block.modules() for name in OVERRIDES]
    new = copy.deepcopy(block, {id(hook): hook for hook in hooks if hook is not None}).float()
    for module in new.modules():
        for name in OVERRIDES:
            module.__dict__.pop(name, None)
    for p in new.parameters():
        p.requires_grad_(False)
    return new


def trainable(block: nn.Module, model: nn.Module, path: str) -> dict[str, nn.Parameter]:
    """The block's trainable parameters, with gradients enabled.

    Without routers, whose choice of experts has no gradient, and without parameters that have several places.
    """
    experts = {len(p) for p in block.parameters() if p.ndim == 3 and min(p.shape[1:]) > 1}  # not convolutions
    experts |= {len(m) for m in block.modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    several = shared_parameters(model)
    shared = {name for name, p in model.get_submodule(path).named_parameters() if id(p) in several}
    found: dict[str, nn.Parameter] = {}
    for name, p in block.named_parameters():
        routes = p.ndim <= 2 and len(p) in experts and bool(experts)
        if p.is_floating_point() and name not in shared and not routes:
            p.requires_grad_(True)
            found[name] = p
    return found
