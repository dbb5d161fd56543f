"""Heal a pruned model with low-rank adapters (LoRA, arXiv 2106.09685), distilled from the dense model.

The pruned model learns to give the dense model's probabilities (arXiv 1503.02531) on the calibration windows: what is
learned is not the text but the dense model's answer to it.  The adapters are merged into the weights afterwards, so
that a checkpoint stays in its format and costs nothing more to run.  Needs peft.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dropformer.metrics.blockwise.divergence import first_changed
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.repair.base import Changes, RepairContext
from dropformer.prune.discovery.trace import outputs_of
from dropformer.prune.loading.parts import replaced
from dropformer.prune.surgery.views import sharing_copy

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Healing:
    """How to train: ranks, the highest learning rate, passes over the windows, every how many positions' logits count.

    `room`: bytes of a pass that may be kept for its gradients; where they take more, blocks run again instead.
    """

    rank: int = 16
    rate: float = 1e-3
    epochs: int = 2
    stride: int = 4
    warm_up: int = 8
    room: int = 2 << 30

    def factor(self, step: int, steps: int) -> float:
        """The share of the learning rate at a step: up within `warm_up` steps, then down along a cosine."""
        return min(1.0, (step + 1) / self.warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def fit_adapters(context: RepairContext) -> Changes:
    """Adapters around every linear module behind the first gap, on top of earlier repairs, merged."""
    found = context.variant()
    tenths = _Tenths(context.tell)
    return Changes(heal(context.runner, found.modules(), first_changed(context.runner, found.paths), progress=tenths))


class _Tenths:
    """A line for each tenth of the training."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell

    def __call__(self, step: int, steps: int) -> None:
        if step * 10 // steps > (step - 1) * 10 // steps:
            self.tell(f"lora: {step} of {steps} steps")


def heal(
    runner: BlockRunner,
    modules: Mapping[str, nn.Module],
    first: int,
    how: Healing | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Parameter name -> merged weight, of every linear module in the blocks from `first` on; the model does not change.

    `modules` replace the dense model's.  Time: a dense forward pass, and two forward passes and a backward pass
    of the pruned model, for each batch and epoch.  Memory: the stream of a batch between blocks and one block's
    activations, which are computed again for the backward pass, its logits twice, and the adapters with two moments
    each; the merged weights go to the runner's keeper one by one.  A batch whose activations fit into `room` keeps
    them, which spares a forward pass.
    """
    how = how or Healing()
    student = sharing_copy(runner.model)
    with ExitStack() as stack:
        stack.enter_context(replaced(student, modules))
        stack.enter_context(flags(runner.model, modules.values()))
        adapted = adapters(student, linear_paths(student, runner, first), how)
        behind = [block.path for block in runner.blocks[first:]]
        again = behind if activations(student, adapted, runner) > how.room else []
        with recomputing(student, again):
            train(student, adapted.values(), runner, how, progress)
        passes = 4 if again else 3
        runner.work.spent += (len(runner.blocks) + passes * len(behind)) * runner.tokens * how.epochs
        return {f"{path}.weight": runner.keeper.keep(merged(adapted.pop(path))) for path in list(adapted)}


def activations(student: nn.Module, adapted: Iterable[str], runner: BlockRunner) -> int:
    """About how many bytes a pass keeps for its gradients: what linear modules read and write, three times over."""
    widths = sum(sum(student.get_parameter(f"{path}.weight").shape) for path in adapted)
    most = max(inputs["input_ids"].numel() for inputs in runner.batches)
    return 3 * widths * most * runner.start(0).element_size()


def shuffled(count: int, seed: int) -> list[int]:
    """0 ... count - 1 in an order of its own for each seed: domains are mixed, so that none is learned last."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def linear_paths(model: nn.Module, runner: BlockRunner, first: int) -> list[str]:
    """The linear modules in the blocks from `first` on."""
    return [
        f"{block.path}.{name}"
        for block in runner.blocks[first:]
        for name, module in model.get_submodule(block.path).named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]


def adapters(student: nn.Module, paths: Sequence[str], how: Healing) -> dict[str, Any]:
    """Put an adapter that does nothing yet around each of the student's modules at these paths."""
    from peft import LoraConfig, inject_adapter_in_model

    turned = any(isinstance(student.get_submodule(path), Conv1D) for path in paths)
    config = LoraConfig(
        r=how.rank, lora_alpha=2 * how.rank, target_modules=list(paths), bias="none", fan_in_fan_out=turned
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(config, student)
    return {path: student.get_submodule(path) for path in paths}


def train(
    student: nn.Module,
    adapted: Iterable[Any],
    runner: BlockRunner,
    how: Healing,
    progress: Progress | None,
) -> None:
    """Bring KL(dense || student) down, one batch a step, domains mixed, positions in turn."""
    steps = [batch for epoch in range(how.epochs) for batch in shuffled(len(runner), epoch)]
    learned = [p for adapter in adapted for p in adapter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=how.rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in enumerate(steps):
        inputs = runner.batches[batch]
        positions = _positions(inputs["input_ids"], runner.counted[batch], step % how.stride, how.stride)
        for group in optimizer.param_groups:
            group["lr"] = how.rate * how.factor(step, len(steps))
        with torch.no_grad():
            goal = log_probabilities(runner.model, inputs, positions)
        with torch.enable_grad():
            found = log_probabilities(student, inputs, positions)
            loss = nn.functional.kl_div(found, goal, log_target=True, reduction="sum") / goal.shape[:-1].numel()
            loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress:
            progress(step + 1, len(steps))


def _positions(ids: Tensor, counted: Tensor | None, first: int, stride: int) -> Tensor:
    """Every `stride`-th of the positions whose next token counts in any of the batch's windows, from `first` on."""
    if counted is None:
        return torch.arange(first, ids.shape[1], stride)
    found = counted[:, 1:].any(0).nonzero()[:, 0].cpu()
    return found[min(first, len(found) - 1) :: stride]


def log_probabilities(model: nn.Module, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
    """[B, positions, V] in float32."""
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    positions = positions.to(inputs["input_ids"].device)
    output = model(**inputs, **({"logits_to_keep": positions} if few else {}))
    logits = getattr(output, "logits", None)
    logits = next(iter(outputs_of(output).values())) if logits is None else logits
    logits = logits if few else logits[:, positions]
    return torch.log_softmax(logits.float(), -1)


def merged(adapter: Any) -> Tensor:
    """The weight of the linear module with its adapter added, in its dtype."""
    base, delta = adapter.get_base_layer(), adapter.get_delta_weight("default").detach()
    step = delta.T if isinstance(base, Conv1D) and delta.shape != base.weight.shape else delta
    return (base.weight.detach().float() + step.float()).to(base.weight.dtype).contiguous()


@contextmanager
def recomputing(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Inside the `with` these blocks keep only their inputs for the backward pass, and run again there."""
    own = [model.get_submodule(path) for path in blocks]
    for block in own:
        vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in own:
            vars(block).pop("forward")


@contextmanager
def flags(model: nn.Module, others: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the `with` no parameter of these modules asks for a gradient; afterwards those that did do again."""
    parameters = [p for module in (model, *others) for p in module.parameters()]
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)
