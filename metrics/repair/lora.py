"""Heal a pruned model with low-rank adapters (LoRA, arXiv 2106.09685), distilled from the dense model.

The pruned model learns to give the dense model's probabilities (arXiv 1503.02531) on the calibration windows: what is
learned is not the text but the dense model's answer to it.  The adapters are merged into the weights afterwards, so
that a checkpoint stays in its format and costs nothing more to run.  Weights of norms, a number a channel, are
learned as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dropformer.metrics.blockwise.divergence import first_changed
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.repair.adapters import Adapter, Shift, adapters
from dropformer.metrics.repair.base import Changes, RepairContext, set_rate, shuffled
from dropformer.prune.loading.parts import output_embeddings, replaced
from dropformer.prune.surgery.views import sharing_copy

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Healing:
    """How to train: rank of the adapters, highest learning rates, passes over the windows, positions that count.

    `norms`: the learning rate of norms' weights, relative to the root mean square of each.  `tokens`: of a step; a
    batch of more, as a GPU's are, is taken apart into as many windows as these hold, one at least.  `stride`: logits
    count at every so many positions; 0: as many as keep the head no dearer than the blocks, at most 4.
    `room`: bytes of a pass that may be kept for its gradients; where they take more, blocks run again instead.
    `logits`: bytes of logits that are held at a time.
    """

    rank: int = 16
    rate: float = 1e-3
    norms: float = 3e-3
    epochs: int = 2
    tokens: int = 512
    stride: int = 0
    warm_up: int = 8
    room: int = 2 << 30
    logits: int = 64 << 20


def fit_adapters(context: RepairContext) -> Changes:
    """Adapters around every linear module and norm behind the first gap, on top of earlier repairs, merged.

    Where a GPU's memory runs out it starts again, and blocks run again in the backward pass.
    """
    found, how = context.variant(), replace(Healing(), **context.training)
    runner = context.in_steps(how.tokens).runner
    run = partial(heal, runner, found.modules(), first_changed(runner, found.paths), progress=_Tenths(context.tell))
    try:
        return _changes(run(how), context)
    except torch.OutOfMemoryError:
        context.tell("lora: out of memory, so again from the start, with blocks run again in the backward pass")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the failed pass's tensors were freed with its stack frames
    return _changes(run(replace(how, room=0, logits=how.logits // 4)), context)


def _changes(tensors: dict[str, Tensor], context: RepairContext) -> Changes:
    missed = () if tensors else context.dropped
    return Changes(tensors, unrepaired=tuple((str(layer), "no linear module or norm follows it") for layer in missed))


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
    """Parameter name -> new value, of linear modules and norms in the blocks from `first` on; the model stays.

    `modules` replace the dense model's.  Time: one dense forward pass; for each batch and epoch the changed blocks
    forwards and, through weights that stay as they are, backwards, which is about as much again; the head three
    times at the positions that count.  Memory: two streams of all windows, which the keeper may move out; one
    batch's activations, or, where they do not fit into `room`, those of one block, which then runs again; logits
    within `logits`, and the adapters with two moments each.
    """
    how = how or Healing()
    student = sharing_copy(runner.model)
    with ExitStack() as stack:
        stack.enter_context(replaced(student, modules))
        stack.enter_context(flags(runner.model, modules.values()))
        behind = [block.path for block in runner.blocks[first:]]
        learned = adapters(student, behind, how.rank)
        if not learned:
            return {}
        again = behind if activations(learned, runner) > how.room else []
        stack.enter_context(replaced(student, learned))
        stack.enter_context(recomputing(student, again))
        lesson = Lesson(runner, runner.of(student), first, how, 2 if again else 1)
        train(lesson, learned, progress)
        return {
            f"{path}.{name}": runner.keeper.keep(value)
            for path in list(learned)
            for name, value in learned.pop(path).merged().items()
        }


def activations(learned: Mapping[str, Adapter | Shift], runner: BlockRunner) -> int:
    """About how many bytes a pass keeps for its gradients: what linear modules read and write, three times over."""
    widths = sum(sum(m.module.get_parameter("weight").shape) for m in learned.values() if isinstance(m, Adapter))
    most = max(inputs["input_ids"].numel() for inputs in runner.batches)
    return 3 * widths * most * runner.start(0).element_size()


class Lesson:
    """The dense streams before the first changed block and at the end, and what the student makes of the former."""

    def __init__(self, dense: BlockRunner, student: BlockRunner, first: int, how: Healing, backward: int) -> None:
        self.dense, self.student, self.first, self.how, self.backward = dense, student, first, how, backward
        self.before: list[Tensor] = []
        streams = [dense.start(batch) for batch in range(len(dense))]
        with torch.no_grad():
            for block in dense.walk():
                self.before = list(streams) if block == first else self.before
                streams = [dense.keeper.keep(dense.step(block, batch, stream)) for batch, stream in enumerate(streams)]
        self.after = streams
        self.stride = how.stride or self._stride()

    def _stride(self) -> int:
        """Positions apart at which the head, run three times, costs no more than the blocks, run twice; 4 at most."""
        blocks = sum(p.numel() for block in self.dense.blocks[self.first :]
                     for p in self.dense.model.get_submodule(block.path).parameters())  # fmt: skip
        head = output_embeddings(self.dense.model)
        words = 4 * blocks if head is None else head.get_parameter("weight").numel()
        return max(1, min(4, -(-3 * words // (2 * max(blocks, 1)))))

    def step(self, batch: int, turn: int) -> int:
        """Add gradients of the KL(dense || student) summed over a batch's positions in turn; gives their number.

        Summed, so that those of 16 bits are not too small to be told from zero.
        """
        positions, counted = self._positions(batch, turn % self.stride), self.dense.counted[batch]
        stream = self.before[batch]
        with torch.enable_grad():
            for block in range(self.first, len(self.student.blocks)):
                stream = self.student.step(block, batch, stream)
            end = stream.detach().requires_grad_(True)
            for some in self._parts(batch, positions):
                self._head(batch, end, some)
            stream.backward(end.grad)
        self._count(batch)
        return len(positions) * len(end) if counted is None else int(counted[:, positions.to(counted.device) + 1].sum())

    def _head(self, batch: int, end: Tensor, positions: Tensor) -> None:
        """Add the gradient at the stream's end of the KL at some positions.

        In logits z of the student, with probabilities p of it and q of the dense model, it is p - q; and 0 in windows
        where the next token does not count.
        """
        counted = self.dense.counted[batch]
        with torch.no_grad():
            goal = torch.softmax(self.dense.logits(batch, self.after[batch], positions).float(), -1)
        logits = self.student.logits(batch, end, positions)
        found = torch.softmax(logits.detach().float(), -1)
        change = found.sub_(goal.to(found.device))
        if counted is not None:
            change *= counted[:, positions.to(counted.device) + 1, None].to(change)
        logits.backward(change.to(logits.dtype))

    def _parts(self, batch: int, positions: Tensor) -> Sequence[Tensor]:
        """Positions whose logits are held together."""
        head = output_embeddings(self.dense.model)
        if head is None or not self.dense.picks_logits:
            return [positions]
        row = 4 * head.get_parameter("weight").shape[0] * len(self.before[batch])
        return positions.split(max(1, self.how.logits // row))

    def _positions(self, batch: int, first: int) -> Tensor:
        """Every so many of the positions whose next token counts in any of the batch's windows, from `first` on."""
        ids, counted = self.dense.batches[batch]["input_ids"], self.dense.counted[batch]
        if counted is None:
            return torch.arange(first, ids.shape[1], self.stride, device=ids.device)
        found = counted[:, 1:].any(0).nonzero()[:, 0].to(ids.device)
        return found[min(first, len(found) - 1) :: self.stride]

    def _count(self, batch: int) -> None:
        """A backward pass through frozen weights takes what a forward pass takes."""
        for block in self.student.blocks[self.first :]:
            module = self.student.model.get_submodule(block.path)
            self.dense.work.add(block.path, module, self.backward * self.dense.batches[batch]["input_ids"].numel())


def train(lesson: Lesson, learned: Mapping[str, Adapter | Shift], progress: Progress | None) -> None:
    """Bring KL(dense || student) down, one batch a step, domains mixed, positions in turn."""
    how = lesson.how
    steps = [batch for epoch in range(how.epochs) for batch in shuffled(len(lesson.dense), epoch)]
    groups = [group for module in learned.values() for group in module.learned(how.rate, how.norms)]
    optimizer = torch.optim.AdamW(groups, lr=how.rate, betas=(0.9, 0.95), weight_decay=0.0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step, batch in enumerate(steps):
        set_rate(optimizer, step, len(steps), how.warm_up)
        count = lesson.step(batch, step)
        for p in parameters:
            p.grad = None if p.grad is None else p.grad.div_(count)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress:
            progress(step + 1, len(steps))


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
