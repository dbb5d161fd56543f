"""Score a model whose weights do not fit in memory: block by block, each read from its files once.

The model's own forward runs.  Each batch of windows has its forward pass in a greenlet, a function that can be
suspended in the middle; a hook in front of every block suspends it until the weights of that block are there.  All
batches pass through a block before the next one is read, so the work is that of an ordinary pass, the reading that of
one copy of the files, and the memory that of one block.
"""

from __future__ import annotations

import copy
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel

from dropformer.metrics.analysis import distributed
from dropformer.metrics.analysis.analyze import calibrated, joined, scores_of
from dropformer.metrics.analysis.capture import WindowScores, capturing
from dropformer.metrics.analysis.measure import exchanged
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.data import CalibrationData
from dropformer.metrics.offload.passes import BlockwisePasses, blocks_of
from dropformer.metrics.offload.process_memory import Budget
from dropformer.metrics.offload.spill import Spill
from dropformer.metrics.offload.weights import Weights
from dropformer.progress import Tick
from dropformer.prune.architecture import Architecture
from dropformer.prune.artifact import ModelRef
from dropformer.prune.discovery.discover import discover
from dropformer.prune.errors import ModelError
from dropformer.prune.files import open_checkpoint
from dropformer.prune.loading.load import build, read_model_config
from dropformer.prune.loading.parts import evaluating
from dropformer.prune.loading.quiet import quiet_transformers


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


def open_streamed(
    path: Path,
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    device: torch.device = torch.device("cpu"),
) -> Streamed:
    """Read a checkpoint's config and headers only; `dtype` "auto" is the config's, `device` where it computes.

    Raises CheckpointError, ArchitectureError or ModelError.
    """
    config = read_model_config(path, trust_remote_code)
    if isinstance(dtype, str):
        dtype = getattr(config, "dtype", None) or torch.float32
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{path} is quantized, and quantized weights cannot be streamed; leave out --memory")
    with quiet_transformers():
        with torch.device("meta"):
            # bfloat16, since the grouped products of experts have no other form there; the dtype is of no matter
            blueprint = build(_unpadded(config), dtype=torch.bfloat16, trust_remote_code=trust_remote_code).eval()
        with init_empty_weights(include_buffers=False):  # buffers such as rotary frequencies are computed, not read
            model = build(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return Streamed(model, blueprint, discover(blueprint), Weights(model, open_checkpoint(path), device))


def _unpadded(config: PreTrainedConfig) -> PreTrainedConfig:
    """Without a padding token, for which some models search the input: on the meta device there are no values."""
    config = copy.deepcopy(config)
    config.pad_token_id = None
    return config


def stream_scores(
    streamed: Streamed, data: CalibrationData, ref: ModelRef, memory: int, size: int = 1, progress: Tick | None = None
) -> Scores:
    """Scores of a model on calibration windows, `size` at a time, in about `memory` bytes of RAM.

    On a GPU, that holds one block, and of what waits between blocks as much as fits in half of the rest.

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
    streamed: Streamed, data: CalibrationData, which: list[int], size: int, memory: int, progress: Tick | None = None
) -> WindowScores:
    """The rows of windows `which`, in their order."""
    batches = [data.batch(which[i : i + size]) for i in range(0, len(which), size)]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(streamed.model))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dropformer-")))
        budget = Budget(memory, streamed.largest_block(), streamed.weights.device)
        run = BlockwisePasses(streamed.model, streamed.weights, streamed.architecture, budget, Spill(folder))
        stack.enter_context(run.gates())
        run.capture = stack.enter_context(capturing(streamed.model, streamed.architecture))
        stack.callback(run.abandon)
        return run.all(batches, progress)
