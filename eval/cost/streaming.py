"""Perplexity and speed over text longer than the context, with attention sinks, in constant memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from dropformer.eval.cost.memory import kv_bytes, state_bytes
from dropformer.eval.cost.sinks import Sinks, sink_cache
from dropformer.eval.cost.timing import Clock, last_logits
from dropformer.progress import Tick
from dropformer.prune.errors import EvaluationError
from dropformer.prune.loading.device import gpus_of, input_device

SEGMENTS = 16  # parts of a text whose perplexity is told


@dataclass(frozen=True)
class StreamResult:
    """Result of reading a text.

    segments: perplexity of equal parts of the text, in order; flat if streaming works.
    cache_bytes: largest cache after a chunk.
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
    """Seconds per token with a full window: from the cache, and recomputing the window."""

    streaming: float
    recompute: float

    @property
    def speedup(self) -> float:
        return self.recompute / self.streaming


@torch.inference_mode()
def stream(model: nn.Module, ids: Tensor, shape: Sinks, progress: Tick | None = None) -> StreamResult:
    """Score every token of ids [T] but the first, with attention sinks, `shape.chunk` tokens at a time.

    Raises ArchitectureError for a model without rotary positions, EvaluationError for under 2 tokens.
    """
    if ids.dim() != 1 or len(ids) < 2:
        raise EvaluationError(f"cannot stream token ids of shape {list(ids.shape)}; expected [T], T > 1")
    cache, nll, largest = sink_cache(model, shape), [], 0
    reader = _cached(model, ids, cache)
    start = time.perf_counter()
    for begin in range(0, len(ids) - 1, shape.chunk):  # the last token is only a target
        end = min(begin + shape.chunk, len(ids) - 1)
        logits = reader(begin, end)
        targets = ids[begin + 1 : end + 1].to(logits.device)
        nll.append(F.cross_entropy(logits.float(), targets, reduction="none").double().cpu())
        largest = max(largest, kv_bytes(cache) + state_bytes(cache))
        if progress is not None:
            progress(end, end)
    seconds = time.perf_counter() - start
    losses = torch.cat(nll)
    parts = torch.tensor_split(losses, min(SEGMENTS, len(losses)))
    return StreamResult(
        mode=f"sinks ({shape})",
        tokens=len(losses),
        nll=float(losses.mean()),
        segments=tuple(math.exp(float(part.mean())) for part in parts),
        seconds=seconds,
        cache_bytes=largest,
    )


@torch.inference_mode()
def streaming_speed(model: nn.Module, ids: Tensor, shape: Sinks, tokens: int = 8) -> StreamSpeed:
    """Time `tokens` single tokens after a full window, cached and recomputed, interleaved; medians.

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
    clock, device = Clock(gpus_of(model)), input_device(model)
    streaming, recomputed = [], []
    for position in range(start, start + tokens + 1):
        streaming.append(clock.timed(partial(cached, position, position + 1))[1].wall)
        window = ids[position + 1 - single.size : position + 1][None].to(device)
        whole = partial(model, input_ids=window, use_cache=False, **last_logits(model))
        recomputed.append(clock.timed(whole)[1].wall)
    return StreamSpeed(statistics.median(streaming[1:]), statistics.median(recomputed[1:]))


def _cached(model: nn.Module, ids: Tensor, cache: Cache) -> Callable[[int, int], Tensor]:
    """Logits [end - start, V] of the tokens from start to end, continuing the cache."""

    def read(start: int, end: int) -> Tensor:
        part = ids[None, start:end].to(input_device(model))
        return model(input_ids=part, past_key_values=cache, use_cache=True).logits[0]

    return read
