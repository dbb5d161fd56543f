"""A draft's view of the dense model's KV cache: what was verified is read there, and only drafted tokens are added.

The dense model's keys and values of verified tokens are nearer to what it computes next than the draft's own
(MagicDec, arXiv 2408.11049), they need no second prefill, and a window of them is a copy of S + W tokens.  An entry
of the view never writes into the dense model's: growing it makes new tensors, and a round's view is thrown away.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dropformer.prune.errors import ModelError
from dropformer.prune.loading.parts import empty_cache, windows_of
from dropformer.prune.loading.window_cache import Window, WindowLayer, sink_slots, tokens_at

SHARED = (DynamicLayer, DynamicSlidingWindowLayer)


def view_of(cache: Cache, draft: nn.Module, sources: Sequence[int], first: Tensor | None = None) -> Cache:
    """A cache for the draft that holds what `cache` holds now.

    sources: for each of the draft's blocks the dense model's block whose attention it has.  first: the first real
    slot of each row, [B], where rows are padded on the left.  Time and memory: a copy of S + W tokens for each
    windowed layer.  Raises ModelError for a cache whose entries are written in place (static, linear attention).
    """
    view = empty_cache(draft)
    modules: dict[str, Any] = dict(draft.named_modules())
    windows = {modules[path].layer_idx: window for path, window in windows_of(draft).items()}
    for index, entry in enumerate(view.layers):
        if type(entry) in SHARED:
            view.layers[index] = _entry(cache.layers[sources[index]], windows.get(index), first)
    return view


def recording_cache(model: nn.Module) -> DynamicCache:
    """An empty cache that keeps what leaves a sliding window, so that `shortened` finds every token."""
    cache = empty_cache(model)
    cache.activate_past_recording()
    return cache


def _entry(dense: Any, window: Window | None, first: Tensor | None) -> Any:
    """The draft's entry over what the dense model's holds."""
    if type(dense) not in SHARED:
        raise ModelError(
            f"a draft cannot share a cache of {type(dense).__name__}, which is written in place; give it a cache of "
            "its own with assistant_model=draft"
        )
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
