"""Forward passes that are suspended before each block until its weights are loaded, and all pass it together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from dropformer.metrics.analysis.analyze import as_inputs, joined, trunk
from dropformer.metrics.analysis.capture import Capture, WindowScores
from dropformer.metrics.offload.process_memory import Budget, return_freed
from dropformer.metrics.offload.spill import Spill
from dropformer.metrics.offload.weights import Weights
from dropformer.progress import Tick
from dropformer.prune.architecture import Architecture, Block
from dropformer.prune.discovery.proof import prove_block
from dropformer.prune.discovery.replay import Replay
from dropformer.prune.loading.parts import input_embeddings

LARGE_EMBEDDING = 32 << 20  # bytes from which an embedding is read row by row
SAMPLE = -1  # the number of the small batch on which each block is proven


@dataclass
class _Pass:
    """One batch on its way through the model: its suspended work, and its rows so far."""

    work: greenlet
    scored: Tensor | None
    rows: WindowScores | None = None

    def add(self, new: WindowScores) -> None:
        """Fill in what has run since the last time."""
        if len(new) == 0 or self.rows is None:
            self.rows = new if len(new) else self.rows
            return
        old, ran = self.rows, ~new.sums.isnan()
        self.rows = WindowScores(torch.where(ran, new.sums, old.sums), torch.where(ran, new.tokens, old.tokens))


class _Seen(Replay):
    """The inputs of the block that is being proven."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = {}


class BlockwisePasses:
    """Takes all passes from block to block, with one block's weights in memory."""

    def __init__(
        self, model: PreTrainedModel, weights: Weights, architecture: Architecture, budget: Budget, spill: Spill
    ) -> None:
        self.model, self.weights = model, weights
        self.blocks = {block.path: block for block in blocks_of(architecture)}
        self.budget, self.spill = budget, spill
        self.capture = Capture(architecture)
        self.passes: dict[int, _Pass] = {}
        self.waiting: dict[str, list[int]] = {}  # block -> the passes that are suspended before it
        self.here = ""  # the block whose weights are loaded
        self.outside: set[str] = set()  # loaded modules that belong to no block
        self.proving = False
        self.hub = getcurrent()

    def all(self, batches: list[tuple[dict[str, Tensor], Tensor | None]], progress: Tick | None) -> WindowScores:
        """Run every batch to its end; the rows in order."""
        sample = {"input_ids": batches[0][0]["input_ids"][:1, :8].repeat(2, 1)}
        for number, (inputs, scored) in enumerate([(sample, None), *batches], SAMPLE):
            self.passes[number] = _Pass(self._forward(inputs), scored)
            self._advance(number)
        report = _Report(progress, len(self.blocks), [batch.scored for batch in self.passes.values()])
        while self.waiting:
            path = next(iter(self.waiting))
            self._enter(path)
            for number in self.waiting.pop(path):
                self.spill.restore(number)
                self._advance(number)
                report.advanced(self.passes[number].scored)
        return joined([batch.rows for number, batch in self.passes.items() if number != SAMPLE and batch.rows])

    def abandon(self) -> None:
        """End what is still suspended, after an error."""
        for batch in self.passes.values():
            if not batch.work.dead:
                batch.work.throw(GreenletExit)

    def _forward(self, inputs: dict[str, Tensor]) -> greenlet:
        part = trunk(self.model)

        def run() -> None:
            part(**as_inputs(part, inputs, self.weights.device))

        return greenlet(run)

    def _advance(self, number: int) -> None:
        """Let a pass run until it needs a block that is not there, or ends."""
        batch = self.passes[number]
        self.capture.scored = batch.scored
        wanted = batch.work.switch()
        batch.add(self.capture.take())
        if batch.work.dead:
            return
        self.waiting.setdefault(wanted, []).append(number)
        if number > SAMPLE and self.here:
            self.budget.observe(self.spill, self.weights.nbytes(self.here, loaded=True))
        buffers = {buffer.untyped_storage().data_ptr() for buffer in self.model.buffers()}
        self.spill.park(number, batch.work.gr_frame, buffers)

    def _enter(self, path: str) -> None:
        """Load a block in the place of the one before and of what came before all blocks."""
        if self.here:
            self.weights.release(self.here)
        for module in [m for m in self.outside if m and not path.startswith(m + ".")]:
            self.weights.release(module, recurse=False)
            self.outside.discard(module)
        return_freed()
        self.weights.load(path)
        self.here = path

    @contextmanager
    def gates(self) -> Iterator[None]:
        """Hooks that suspend a pass in front of each block, and load what belongs to no block when it is called."""
        with ExitStack() as hooks:
            for path, module in self.model.named_modules():
                if path in self.blocks:
                    gate = partial(self._at_block, path)
                elif not any(path.startswith(block + ".") for block in self.blocks) and holds_weights(module):
                    gate = partial(self._at_other, path)
                else:
                    continue
                hooks.callback(module.register_forward_pre_hook(gate, prepend=True, with_kwargs=True).remove)
            yield

    def _at_block(self, path: str, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.here != path:
            self.hub.switch(path)
        if getcurrent() is self.passes[SAMPLE].work and not self.proving:
            self._prove(path, args, kwargs)

    def _prove(self, path: str, args: tuple, kwargs: dict) -> None:
        """Drop each branch of the block for a moment, on the small batch, now that its weights are there."""
        replay = _Seen(self.model)
        replay.seen[path] = [(args, kwargs)]
        self.proving, self.capture.listening = True, False
        try:
            prove_block(replay, self.blocks[path])
        finally:
            self.proving, self.capture.listening = False, True

    def _at_other(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module is input_embeddings(trunk(self.model)) and self._is_large(path):
            self.weights.load_rows(path, args[0] if args else kwargs["input"])
        elif path not in self.outside:
            self.weights.load(path, recurse=False)
        self.outside.add(path)

    def _is_large(self, path: str) -> bool:
        size = self.weights.nbytes(path) + self.weights.nbytes(path, loaded=True)
        return size > LARGE_EMBEDDING and self.weights.has_rows(path)


@dataclass
class _Report:
    """Tells how far all passes are, in windows: a window that is past half of the blocks counts half."""

    progress: Tick | None
    blocks: int
    scored: list[Tensor | None]
    windows: float = 0.0
    tokens: float = 0.0

    def advanced(self, scored: Tensor | None) -> None:
        if self.progress and scored is not None:
            self.windows += len(scored) / self.blocks
            self.tokens += int(scored.sum()) / self.blocks
            self.progress(int(self.windows + 1e-6), int(self.tokens + 1e-6))


def blocks_of(architecture: Architecture) -> list[Block]:
    return [block for stack in architecture.stacks for block in stack.blocks]


def holds_weights(module: nn.Module) -> bool:
    """Does a module hold weights itself, not only in those below it?"""
    saved = set(module._buffers) - module._non_persistent_buffers_set
    return any(p is not None for p in module._parameters.values()) or bool(saved)
