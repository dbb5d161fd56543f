"""A draft's view of the dense model's KV cache: verified tokens are read from it, only drafted tokens are added.

The dense model's keys and values of verified tokens predict its next tokens better than the draft's own (MagicDec,
arXiv 2408.11049), need no second prefill, and a window of them is a copy of S + W tokens.  An entry of the view never
writes into the dense cache: growing it allocates new tensors, and a view lasts one round.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from dropformer.prune.errors import ModelError
from dropformer.prune.loading.parts import empty_cache, windows_of
from dropformer.prune.loading.window_cache import Window, WindowLayer, sink_slots, tokens_at

SHARED = (DynamicLayer, DynamicSlidingWindowLayer)


def view_of(cache: Cache, draft: nn.Module, sources: Sequence[int], first: Tensor | None = None) -> Cache:
    """A cache for the draft that holds what `cache` holds now.

    sources: the dense block whose attention each block of the draft has.  first: the first real slot of each row,
    [B], if rows are padded on the left.  Time and memory: a copy of S + W tokens per windowed layer.  Raises ModelError
    for a cache with entries that hold more than keys and values, or are written in place (linear attention, static).
    """
    view = empty_cache(draft)
    modules: dict[str, Any] = dict(draft.named_modules())
    windows = {modules[path].layer_idx: window for path, window in windows_of(draft).items()}
    for index, entry in enumerate(view.layers):
        if _shared(entry) and _shared(dense := cache.layers[sources[index]]):
            view.layers[index] = _entry(dense, windows.get(index), first)
    return view


def recording_cache(model: nn.Module) -> DynamicCache:
    """An empty cache that keeps tokens beyond a sliding window, which `shortened` needs.  Raises as `view_of`."""
    cache = empty_cache(model)
    for entry in cache.layers:
        _shared(entry)
    cache.activate_past_recording()
    return cache


def _entry(dense: Any, window: Window | None, first: Tensor | None) -> Any:
    """The draft's entry for a dense entry."""
    if window is None or type(dense) is not DynamicLayer or dense.get_seq_length() <= window.width + window.sinks:
        return copy.copy(dense)
    entry = WindowLayer(window)
    assert dense.keys is not None and dense.values is not None
    entry.lazy_initialization(dense.keys, dense.values)
    length = dense.get_seq_length()
    entry.cumulative_length, entry.first = length, first
    last = slice(length - (window.width - 1), length)
    entry.keys, entry.values = dense.keys[..., last, :].clone(), dense.values[..., last, :].clone()
    if window.sinks:
        places = sink_slots(first, window.sinks, dense.keys)
        entry.sink_keys, entry.sink_values = tokens_at(dense.keys, places), tokens_at(dense.values, places)
    return entry


def _shared(entry: Any) -> bool:
    """Is the entry one that two models can read?  False where it holds nothing.  Raises ModelError for others."""
    if type(entry) in SHARED or isinstance(entry, DummyLayer):
        return type(entry) in SHARED
    raise ModelError(
        f"a draft cannot share a cache of {type(entry).__name__}, which holds more than keys and values or is written "
        "in place; give it a cache of its own with assistant_model=draft"
    )
