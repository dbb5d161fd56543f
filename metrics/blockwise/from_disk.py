"""Selection and repair of a model whose weights do not fit in memory: each block is read once for all windows.

    source = open_source_of_blocks(folder, memory)
    Improver(source.model, data, quality, source=source.source, keeper=source.keeper)

Modules outside the blocks (embeddings, final norm, head) stay in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dropformer.metrics.blockwise.provider import Source
from dropformer.metrics.offload.keeper import Keeper
from dropformer.metrics.offload.passes import blocks_of, holds_weights
from dropformer.metrics.offload.process_memory import MARGIN, resident, return_freed, shown
from dropformer.metrics.offload.streaming import Streamed, open_streamed
from dropformer.metrics.offload.weights import Weights
from dropformer.prune.errors import ModelError

MOMENTS = 7  # square matrices as wide as a slot's input that a fit holds at once


class FromDisk:
    """A provider that reads a block's weights from the checkpoint's files when it is entered."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self._here = weights, ""

    def enter(self, path: str) -> None:
        if path == self._here and not any(p.is_meta for p in self.weights.model.get_submodule(path).parameters()):
            return
        if path != self._here:
            self.leave()
            return_freed()
        with torch.inference_mode(False), torch.no_grad():  # the memory is reused for other blocks
            self.weights.load(path)
        self._here = path

    def leave(self) -> None:
        if self._here:
            self.weights.release(self._here)
        self._here = ""


@dataclass(frozen=True)
class BlockSource:
    """A model without its blocks' weights, the provider that loads them, and a keeper for the remaining memory."""

    model: nn.Module
    source: Source
    keeper: Keeper

    def given(self) -> dict[str, Any]:
        """As arguments of an `Improver`."""
        return {"source": self.source, "keeper": self.keeper}


def open_source_of_blocks(
    path: Path,
    memory: int,
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    device: torch.device = torch.device("cpu"),
) -> BlockSource:
    """Open a checkpoint for an improver that uses about `memory` bytes of RAM.

    With a GPU, weights and moments are on it, and RAM holds what is kept between blocks.  Raises ModelError if the
    modules outside the blocks, the largest block and the moments of its widest slot do not fit, CheckpointError or
    ArchitectureError.
    """
    streamed = open_streamed(path, dtype, trust_remote_code, device)
    model, weights = streamed.model, streamed.weights
    blocks = [block.path for block in blocks_of(streamed.architecture)]
    outside = [
        name
        for name, module in model.named_modules()
        if holds_weights(module) and not any(name == b or name.startswith(b + ".") for b in blocks)
    ]
    needed = streamed.largest_block() + _moments(streamed)
    held = sum(weights.nbytes(name) for name in outside)  # embeddings tied to the head are counted twice
    if device.type != "cpu":  # these are on the GPU, which raises its own error if they do not fit
        held = needed = 0
    free = int(memory * (1 - MARGIN)) - resident() - held - needed
    if free < 0:
        raise ModelError(
            f"--memory {shown(memory)} is too little to choose and repair: the program takes {shown(resident())}, the "
            f"embeddings and the head {shown(held)}, a block and the moments of a fit {shown(needed)}; give at least "
            f"{shown(int((memory - free) * 1.1))}, or compute in --dtype bfloat16"
        )
    for name in outside:
        weights.load(name, recurse=False)
    model.tie_weights()
    provider = FromDisk(weights)
    return BlockSource(model, Source(streamed.architecture, streamed.blueprint, provider), Keeper(host=free))


def _moments(streamed: Streamed) -> int:
    """Bytes of the fit of the widest slot."""
    modules = streamed.blueprint.modules()
    width = max((m.in_features for m in modules if isinstance(m, nn.Linear)), default=0)
    return MOMENTS * 4 * width * width
