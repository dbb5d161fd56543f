"""Attention layers that see the last W tokens and the first S: sliding windows with attention sinks.

Self-contained, as `modeling.py` is.  A windowed layer keeps its own module and weights.  Its attention runs through
a function of its own in transformers' attention interface, which masks and skips what lies outside the window and
leaves the rest to the implementation that the model uses; its cache entry holds S + W tokens (`window_cache.py`).
Keys keep the rotary positions that they were written with (attention sinks: arXiv 2309.17453, which renumbers them).
"""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .window_cache import Slots, StaticWindowLayer, Window, WindowLayer, sink_slots, tokens_at, window_entry

ATTENTION = f"windows of {__name__}"  # a copy beside a checkpoint has a name of its own
BAND = 256  # queries computed at once where a window is narrower than that


def first_real(mask: Tensor | None) -> Tensor | None:
    """The first slot of each row that its last query may see, [B]; None where nothing says that rows are padded.

    mask: [B, 1, Q, K] booleans or additive, or [B, K] of real tokens.
    """
    if mask is None:
        return None
    row = mask[:, 0, -1] if mask.ndim == 4 else mask
    seen = (
        row
        if row.dtype == torch.bool
        else (row > torch.finfo(row.dtype).min / 2 if row.is_floating_point() else row > 0)
    )
    return seen.int().argmax(-1)


def windowed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Attention of a windowed layer: [B, H, Q, D], [B, H', K, D] -> [B, Q, H, D], as transformers' interface has it.

    Time and memory are those of Q x (W + S) pairs for a prompt, in bands of queries, and of W + S for a token.
    """
    run, window, entry = _implementation(module), module.window, module.entry
    first = first_real(attention_mask)
    if isinstance(entry, StaticWindowLayer):
        last = entry.cumulative_length
        q_slots = last - query.shape[2] + torch.arange(query.shape[2], device=query.device)
        mask = _allowed(q_slots, entry.slots, first, window, attention_mask, query.dtype)
        return run(module, query, key, value, mask, **kwargs)
    slots = entry.slots if entry is not None else Slots(0, 0, key.shape[2])
    if slots.stop <= window.width and attention_mask is None:  # all within the window
        return run(module, query, key, value, None, **kwargs)
    sinks = key[:, :, : slots.sinks], value[:, :, : slots.sinks]
    key, value = key[:, :, slots.sinks :], value[:, :, slots.sinks :]
    if not slots.sinks and window.sinks:
        at = sink_slots(first, window.sinks, key) - slots.start
        sinks = tokens_at(key, at), tokens_at(value, at)
    found = []
    band = max(window.width, BAND)
    for start in range(0, query.shape[2], band):
        part = query[:, :, start : start + band]
        from_slot = slots.stop - query.shape[2] + start
        low = max(slots.start, from_slot - window.width + 1)
        high = from_slot + part.shape[2]
        near = torch.arange(low, high, device=query.device)[None]
        k, v = (t[:, :, low - slots.start : high - slots.start] for t in (key, value))
        if window.sinks and low > 0:
            far = sink_slots(first, window.sinks, key)
            near = torch.cat([torch.where(far < low, far, -1), near.expand(len(far), -1)], 1)
            k, v = torch.cat([sinks[0], k], 2), torch.cat([sinks[1], v], 2)
        q_slots = torch.arange(from_slot, high, device=query.device)
        one = part.shape[2] == 1 and attention_mask is None and low >= window.sinks
        rows = attention_mask
        if rows is not None and rows.ndim == 4 and rows.shape[2] == query.shape[2]:
            rows = rows[:, :, start : start + band]
        allowed = None if one else _allowed(q_slots, near, first, window, rows, query.dtype)
        found.append(run(module, part, k, v, allowed, **kwargs)[0])
    return torch.cat(found, 1), None


def _allowed(q: Tensor, k: Tensor, first: Tensor | None, window: Window, mask: Tensor | None, dtype: Any) -> Tensor:
    """What each query may see, additive: [Q], [B or 1, K] -> [B or 1, 1, Q, K].  `mask` is the model's, by slots.

    With W = 2, S = 1 and no padding, query 4 against the slots 0, -1 (none), 3, 4: yes, no, yes, yes.
    """
    q, k = q[None, :, None], k[:, None, :]
    sink_end = (0 if first is None else first[:, None, None]) + window.sinks
    seen = (k >= 0) & (k <= q) & ((k > q - window.width) | (k < sink_end))
    if first is not None:
        seen = seen & (k >= first[:, None, None])
    seen = seen[:, None]
    if mask is None or mask.ndim != 4:
        return torch.zeros(seen.shape, dtype=dtype, device=k.device).masked_fill(~seen, torch.finfo(dtype).min)
    at = k.clamp(0, mask.shape[-1] - 1)[:, None].expand(len(mask), mask.shape[1], mask.shape[2], -1)
    own = mask.gather(-1, at)
    if own.dtype == torch.bool:
        own = torch.zeros(own.shape, dtype=dtype, device=own.device).masked_fill(~own, torch.finfo(dtype).min)
    return own.masked_fill(~seen, torch.finfo(dtype).min)


def _implementation(module: Any) -> Any:
    """What computes attention elsewhere in the model; its sdpa where that has no masks (flash attention)."""
    name = module.model_config._attn_implementation
    return (
        sys.modules[type(module).__module__].eager_attention_forward
        if name == "eager"
        else ALL_ATTENTION_FUNCTIONS["sdpa"]
    )


def window_attention(module: Any, window: Window) -> None:
    """Give an attention module of transformers a window, in place; its weights stay.

    Raises ValueError where the module has no entry in a cache, does not go through the attention interface, or has
    a window of its own.
    """
    if reason := unfit(module):
        raise ValueError(reason)
    module.window, module.entry, module.model_config = window, None, module.config
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = ATTENTION
    module.register_forward_pre_hook(_enter, with_kwargs=True)


def unfit(module: nn.Module) -> str:
    """Why a module cannot have a window; empty where it can."""
    name, names = type(module).__name__, inspect.unwrap(type(module).forward).__code__.co_names
    if not getattr(module, "is_causal", True):
        return f"{name} is not causal: a window of the last tokens fits only attention to what came before"
    if not isinstance(getattr(module, "layer_idx", None), int) or "ALL_ATTENTION_FUNCTIONS" not in names:
        return f"{name} does not compute attention through transformers' attention interface, so it takes no window"
    if getattr(module, "sliding_window", None) or "sliding" in str(getattr(module, "layer_type", "")):
        return f"{name} of layer {module.layer_idx} has a sliding window already"
    return ""


def _enter(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a windowed attention: its cache entry is one of a window, and knows where each row begins."""
    cache = kwargs.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)
    module.entry = None
    if cache is None:
        return
    entry = window_entry(cache, module.layer_idx, module.window)
    if isinstance(entry, (WindowLayer, StaticWindowLayer)):
        entry.first = first_real(kwargs.get("attention_mask"))
        module.entry = entry
    elif type(entry) is not DynamicLayer:  # a dynamic one that another model filled holds every token
        raise ValueError(f"layer {module.layer_idx} has a window, which {type(entry).__name__} cannot hold")


def prepare_windows(model: nn.Module, cache: Any, recording: bool = False) -> None:
    """Make a new cache's entries fit the model's windows before anything is written into it."""
    cache = getattr(cache, "self_attention_cache", cache)
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "window", None), Window):
            window_entry(cache, module.layer_idx, module.window)
    if recording:
        cache.activate_past_recording()


AttentionInterface.register(ATTENTION, windowed_attention)
