"""Bytes of a model's parameters, of its KV cache, and at the peak of a computation.

KV bytes are counted from the cache's tensors, not from a config, so grouped heads, sliding windows and dropped
attention layers (with an empty cache entry) are counted correctly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dropformer.metrics.offload.process_memory import PeakMemory
from dropformer.prune.errors import EvaluationError, reason
from dropformer.prune.loading.device import input_device

T = TypeVar("T")

_LENGTHS = (16, 48)  # tokens of the two prefills whose difference is the cost of one more token
_KV_NAMES = ("keys", "values", "sink_keys", "sink_values", "indexer_keys", "_quantized_keys", "_quantized_values")
_STATE_NAMES = ("conv_states", "recurrent_states")


@dataclass(frozen=True)
class Peak:
    """Peak memory of a computation above the level before it, in bytes, and how it was read."""

    nbytes: int
    source: str  # "cuda", "rss" or "rss (lifetime)"

    def __str__(self) -> str:
        return f"{self.nbytes / 2**20:.1f} MiB ({self.source})"


def kv_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a transformers `Cache`; for a StaticCache, all that it has reserved.

    Without linear-attention states: see `state_bytes`.
    """
    return sum(layer_kv_bytes(cache))


def layer_kv_bytes(cache: Any) -> list[int]:
    """KV bytes per layer; 0 for a layer without a cache (a dropped attention layer's DummyLayer)."""
    return [_bytes_of(getattr(layer, name, None) for name in _KV_NAMES) for layer in _layers(cache)]


def state_bytes(cache: Any) -> int:
    """Bytes of the convolution and recurrent states of linear-attention layers: constant in the context."""
    return sum(_bytes_of(getattr(layer, name, None) for name in _STATE_NAMES) for layer in _layers(cache))


@torch.inference_mode()
def layer_kv_bytes_per_token(model: nn.Module) -> list[int]:
    """Bytes that one more token adds to each layer's cache, for one sequence.

    The difference of two short prefills: a constant state cancels, and a layer whose window is shorter than both adds
    nothing.  A layer with a window from a plan adds nothing either, whatever its width: see `kv_bytes_at`.  Works on
    the meta device.  Empty for a model without a cache (an encoder, an image model).  Raises EvaluationError if the
    model cannot be run on token ids alone.
    """
    caches = [_prefill(model, length) for length in _LENGTHS]
    short, long = (layer_kv_bytes(cache) for cache in caches)
    step = _LENGTHS[1] - _LENGTHS[0]
    short += [0] * (len(long) - len(short))
    added = [(after - before) // step for before, after in zip(short, long, strict=True)]
    return [0 if _plan_window(layer) else one for layer, one in zip(_layers(caches[1]), added, strict=True)]


def kv_bytes_per_token(model: nn.Module) -> int:
    """Bytes that one more token adds to the whole KV cache; see `layer_kv_bytes_per_token`."""
    return sum(layer_kv_bytes_per_token(model))


@torch.inference_mode()
def kv_bytes_at(model: nn.Module, context: int) -> int:
    """Bytes of the KV cache of one sequence of `context` tokens, from one short prefill.

    A layer with a window of W tokens and S sinks holds min(context, W + S) of them.  0 for a model without a cache.
    Raises EvaluationError as `layer_kv_bytes_per_token`.
    """
    cache = _prefill(model, _LENGTHS[1])
    total = 0.0
    for layer, held in zip(_layers(cache), layer_kv_bytes(cache), strict=True):
        if tokens := _tokens_held(layer):
            total += held / tokens * min(context, _most_tokens(layer))
    return round(total)


def _plan_window(layer: Any) -> Any:
    """The window of a cache entry, by its attributes: checkpoints carry their own copy of the entry's class."""
    window = getattr(layer, "window", None)
    return window if hasattr(window, "sinks") else None


def _most_tokens(layer: Any) -> float:
    """Most tokens that a cache entry holds."""
    if window := _plan_window(layer):
        return window.width + window.sinks
    return getattr(layer, "sliding_window", None) or math.inf


def _tokens_held(layer: Any) -> int:
    """Tokens in a cache entry."""
    parts = (getattr(layer, name, None) for name in ("keys", "sink_keys"))
    return sum(part.shape[-2] for part in parts if isinstance(part, Tensor) and part.dim() == 4)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the parameters in their dtypes, tied ones counted once."""
    return _bytes_of(model.parameters())


def peak_of(function: Callable[[], T], device: torch.device | str = "cpu") -> tuple[T, Peak]:
    """Run `function` and return its result with the peak memory it added.

    See `PeakMemory` for what is counted; run the function once before, so that lazy loading is not counted.
    """
    memory = PeakMemory(device)
    result = function()
    return result, Peak(memory.extra, memory.source)


def _prefill(model: nn.Module, length: int) -> Any:
    """The cache after `length` tokens; None for a model without one."""
    if "input_ids" not in inspect.signature(model.forward).parameters:
        return None
    ids = torch.ones((1, length), dtype=torch.long, device=input_device(model))
    inputs = {"input_ids": ids, "use_cache": True}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    try:
        return getattr(model(**inputs), "past_key_values", None)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise EvaluationError(
            f"{type(model).__name__} cannot be run on {length} token ids ({reason(error, 120)}); its KV cache cannot "
            "be measured"
        ) from error


def _layers(cache: Any) -> list[Any]:
    if hasattr(cache, "self_attention_cache"):  # EncoderDecoderCache
        return _layers(cache.self_attention_cache) + _layers(cache.cross_attention_cache)
    return list(getattr(cache, "layers", ()))  # none for a model without a cache, or with a state of its own (RWKV)


def _bytes_of(values: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in chain.from_iterable(map(_tensors, values)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
