"""Score a model whose weights do not fit in memory: block by block, each read from its files once.

The model's own forward runs.  Each batch of windows has its forward pass in a greenlet, a function that
can be suspended in the middle; a hook in front of every block suspends it until the weights of that
block are there.  All batches pass through a block before the next one is read, so the work is that of
an ordinary pass, the reading that of one copy of the files, and the memory that of one block.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dropformer.metrics.analysis import distributed
from dropformer.metrics.analysis.analyze import Progress, as_inputs, calibrated, joined, scores_of, trunk
from dropformer.metrics.analysis.capture import Capture, WindowScores, capturing
from dropformer.metrics.analysis.measure import exchanged
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.data import CalibrationData
from dropformer.metrics.offload.process_memory import Budget, return_freed
from dropformer.metrics.offload.spill import Spill
from dropformer.metrics.offload.weights import Weights
from dropformer.prune.architecture import Architecture, Block
from dropformer.prune.artifact import ModelRef
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.proof import prove_block
from dropformer.prune.discovery.replay import Replay
from dropformer.prune.errors import ModelError
from dropformer.prune.files import open_checkpoint
from dropformer.prune.loading.load import auto_class, read_model_config
from dropformer.prune.loading.parts import evaluating, input_embeddings
from dropformer.prune.loading.quiet import quiet_transformers

LARGE_EMBEDDING = 32 << 20  # bytes from which an embedding is read row by row
SAMPLE = -1  # the number of the small batch on which each block is proven


@dataclass
class Streamed:
    """A model without weights, its architecture, and where its weights are."""

    model: PreTrainedModel
    blueprint: PreTrainedModel  # the same, wholly on the meta device
    architecture: Architecture
    weights: Weights

    def largest_block(self) -> int:
        """Bytes of the largest block once loaded."""
        return max(self.weights.nbytes(block.path) for block in blocks_of(self.architecture))


def _builder(loader: Any) -> Any:
    """How an Auto class, or a model's own class, builds from a config."""
    if hasattr(loader, "from_config"):
        return loader.from_config
    return lambda config, dtype, trust_remote_code: loader._from_config(config, dtype=dtype)


def open_streamed(path: Path, dtype: torch.dtype | str = torch.float32, trust_remote_code: bool = False) -> Streamed:
    """Read a checkpoint's config and headers only; `dtype` "auto" is the config's.

    Raises CheckpointError, ArchitectureError or ModelError.
    """
    config = read_model_config(path, trust_remote_code)
    if isinstance(dtype, str):
        dtype = getattr(config, "dtype", None) or torch.float32
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{path} is quantized, and quantized weights cannot be streamed; leave out --memory")
    build = _builder(auto_class(config))
    with quiet_transformers():
        with torch.device("meta"):
            # bfloat16, since the grouped products of experts have no other form there; the dtype is of no matter
            blueprint = build(_unpadded(config), dtype=torch.bfloat16, trust_remote_code=trust_remote_code).eval()
        with init_empty_weights(include_buffers=False):  # buffers such as rotary frequencies are computed, not read
            model = build(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    return Streamed(model, blueprint, discover(blueprint), Weights(model, open_checkpoint(path)))


def _unpadded(config: PreTrainedConfig) -> PreTrainedConfig:
    """Without a padding token, for which some models search the input: on the meta device there are no values."""
    config = copy.deepcopy(config)
    config.pad_token_id = None
    return config


def stream_scores(
    streamed: Streamed,
    data: CalibrationData,
    ref: ModelRef,
    memory: int,
    size: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """Scores of a model on calibration windows, `size` at a time, in about `memory` bytes of RAM.

    Several processes share the windows.  Raises ModelError where the largest block does not fit, and
    ArchitectureError where a block does not prove to be what it was taken for.
    """
    share = list(range(len(data)))[distributed.rank() :: distributed.world()]
    rows = stream(streamed, data, share, size, memory, progress)
    most = -(-len(data) // distributed.world())
    found = exchanged(share, rows, most, len(streamed.architecture.layers()))
    in_order = joined([found[window] for window in sorted(found)])
    return calibrated(scores_of(streamed.blueprint, streamed.architecture, in_order, ref), data)


def stream(
    streamed: Streamed,
    data: CalibrationData,
    which: list[int],
    size: int,
    memory: int,
    progress: Progress | None = None,
) -> WindowScores:
    """The rows of windows `which`, in their order."""
    batches = [data.batch(which[i : i + size]) for i in range(0, len(which), size)]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(streamed.model))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dropformer-")))
        run = _Run(streamed, Budget(memory, streamed.largest_block()), Spill(folder))
        stack.enter_context(run.gates())
        run.capture = stack.enter_context(capturing(streamed.model, streamed.architecture))
        stack.callback(run.abandon)
        return run.all(batches, progress)


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


class _Run:
    """Drives all passes from block to block."""

    def __init__(self, streamed: Streamed, budget: Budget, spill: Spill) -> None:
        self.model, self.weights = streamed.model, streamed.weights
        self.blocks = {block.path: block for block in blocks_of(streamed.architecture)}
        self.budget, self.spill = budget, spill
        self.capture = Capture(streamed.architecture)
        self.passes: dict[int, _Pass] = {}
        self.waiting: dict[str, list[int]] = {}  # block -> the passes that stand in front of it
        self.here = ""  # the block whose weights are loaded
        self.outside: set[str] = set()  # loaded modules that belong to no block
        self.proving = False
        self.hub = getcurrent()

    def all(self, batches: list[tuple[dict[str, Tensor], Tensor | None]], progress: Progress | None) -> WindowScores:
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
            part(**as_inputs(part, inputs))

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

    progress: Progress | None
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
