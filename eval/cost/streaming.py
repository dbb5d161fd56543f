"""Perplexity and speed over text longer than the context: attention sinks against the alternatives.

`stream` reads a text of any length in constant memory; `recompute` gives every chunk the same context
without a cache, by computing the window anew; `full` keeps everything, which costs memory that grows
and leaves the positions that the model was trained on.  All three score the same tokens.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from dropformer.eval.cost.memory import kv_bytes, state_bytes
from dropformer.eval.cost.sinks import Sinks, sink_cache
from dropformer.prune.errors import EvaluationError
from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.parts import empty_cache

Progress = Callable[[int], None]  # called with the number of tokens read so far
_Reader = Callable[[int, int], Tensor]  # logits [end - start, V] of the tokens from start to end


@dataclass(frozen=True)
class StreamResult:
    """What reading a text one way gave.

    segments: perplexity of equal parts of the text, in order (flat, if memory of the past holds).
    cache_bytes: the most the cache held after a chunk; 0 for `recompute`.
    """

    mode: str
    tokens: int
    nll: float
    segments: tuple[float, ...]
    seconds: float
    cache_bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.mode}: perplexity {self.perplexity:.2f} over {self.tokens} tokens, "
            f"{self.tokens_per_second:.1f} tokens/s, cache {self.cache_bytes / 2**20:.2f} MiB"
        )


@dataclass(frozen=True)
class StreamSpeed:
    """Seconds per token, one at a time, with a full window: from the cache, and recomputing the window."""

    streaming: float
    recompute: float

    @property
    def speedup(self) -> float:
        return self.recompute / self.streaming


def stream(
    model: nn.Module, ids: Tensor, shape: Sinks, *, segments: int = 16, progress: Progress | None = None
) -> StreamResult:
    """Read token ids [T] with attention sinks, `shape.chunk` tokens at a time.

    Raises ArchitectureError for a model without rotary positions, EvaluationError for under 2 tokens.
    """
    cache = sink_cache(model, shape)
    return _read(f"sinks ({shape})", _Text(ids, segments), shape.chunk, _cached(model, ids, cache), cache, progress)


def full(
    model: nn.Module, ids: Tensor, chunk: int = 512, *, segments: int = 16, progress: Progress | None = None
) -> StreamResult:
    """Read token ids [T] with the ordinary cache that keeps every token."""
    cache = empty_cache(model)
    return _read("full cache", _Text(ids, segments), chunk, _cached(model, ids, cache), cache, progress)


def recompute(
    model: nn.Module, ids: Tensor, shape: Sinks, *, segments: int = 16, progress: Progress | None = None
) -> StreamResult:
    """Read token ids [T] by computing, for every chunk, the last `shape.size` tokens from the start."""

    def read(start: int, end: int) -> Tensor:
        window = ids[max(0, end - shape.size) : end].to(_device(model))
        return model(input_ids=window[None], use_cache=False, **_keep(model, end - start)).logits[0, start - end :]

    return _read(f"recomputed ({shape.size} tokens)", _Text(ids, segments), shape.chunk, read, None, progress)


@torch.inference_mode()
def streaming_speed(model: nn.Module, ids: Tensor, shape: Sinks, tokens: int = 8) -> StreamSpeed:
    """Time `tokens` single tokens behind a full window, cached and recomputed, taken in turn; medians.

    ids [T] must be longer than the window.  Raises EvaluationError if it is not.
    """
    single = Sinks(shape.sinks, shape.window, chunk=1)
    start = single.size
    if len(ids) < start + tokens + 1:
        raise EvaluationError(f"a text of {len(ids)} tokens is too short; expected {start + tokens + 1} or more")
    cache = sink_cache(model, single)
    cached = _cached(model, ids, cache)
    for begin in range(0, start, 256):
        cached(begin, min(start, begin + 256))
    streaming, recomputed = [], []
    for position in range(start, start + tokens + 1):
        streaming.append(_seconds(partial(cached, position, position + 1)))
        window = ids[position + 1 - single.size : position + 1][None].to(_device(model))
        recomputed.append(_seconds(partial(model, input_ids=window, use_cache=False, **_keep(model, 1))))
    return StreamSpeed(statistics.median(streaming[1:]), statistics.median(recomputed[1:]))


@dataclass(frozen=True)
class _Text:
    ids: Tensor  # [T]
    segments: int

    def __post_init__(self) -> None:
        if self.ids.dim() != 1 or len(self.ids) < 2:
            raise EvaluationError(f"cannot stream token ids of shape {list(self.ids.shape)}; expected [T], T > 1")


@torch.inference_mode()
def _read(
    mode: str, text: _Text, chunk: int, reader: _Reader, cache: Cache | None, progress: Progress | None
) -> StreamResult:
    """Score every token but the first, reading in chunks; the last token is only a target."""
    ids, nll, largest = text.ids, [], 0
    start = time.perf_counter()
    for begin in range(0, len(ids) - 1, chunk):
        end = min(begin + chunk, len(ids) - 1)
        logits = reader(begin, end)
        targets = ids[begin + 1 : end + 1].to(logits.device)
        nll.append(F.cross_entropy(logits.float(), targets, reduction="none").double().cpu())
        if cache is not None:
            largest = max(largest, kv_bytes(cache) + state_bytes(cache))
        if progress is not None:
            progress(end)
    seconds = time.perf_counter() - start
    losses = torch.cat(nll)
    parts = torch.tensor_split(losses, min(text.segments, len(losses)))
    return StreamResult(
        mode=mode,
        tokens=len(losses),
        nll=float(losses.mean()),
        segments=tuple(math.exp(float(part.mean())) for part in parts),
        seconds=seconds,
        cache_bytes=largest,
    )


def _cached(model: nn.Module, ids: Tensor, cache: Cache) -> _Reader:
    def read(start: int, end: int) -> Tensor:
        return model(input_ids=ids[None, start:end].to(_device(model)), past_key_values=cache, use_cache=True).logits[0]

    return read


def _keep(model: nn.Module, tokens: int) -> dict[str, Any]:
    """Compute the logits of the last `tokens` tokens only, where the model can."""
    return {"logits_to_keep": tokens} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _seconds(function: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _device(model: nn.Module) -> torch.device:
    return input_device(model)
