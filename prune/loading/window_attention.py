"""Attention layers that see the last W tokens and the first S: sliding windows with attention sinks.

Self-contained, as `modeling.py` is.  A windowed layer keeps its own module and weights.  Its attention runs through
a function of its own in transformers' attention interface, which masks and skips what lies outside the window and
leaves the rest to the implementation that the model uses; its cache entry holds S + W tokens (`window_cache.py`).
Keys keep the rotary positions that they were written with (attention sinks: arXiv 2309.17453, which renumbers them).

A folded window has no sinks in its cache but what they gave on average: `sink_logits`, one logit s a head in the
softmax's denominator, and `sink_values`, one vector c a key-value head.  Once the first token has left the window

    output = (sum exp(q.k) v + exp(s) c) / (sum exp(q.k) + exp(s))

which is attention to one key more, of zeros, with s added by the mask and c as its value: exact in eager and sdpa.
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

from .window_cache import Slots, StaticWindowLayer, Window, WindowLayer, ring_slots, sink_slots, tokens_at, window_entry

ATTENTION = f"windows of {__name__}"  # a copy beside a checkpoint has a name of its own
CONSTANTS = ("sink_logits", "sink_values")  # parameters of a folded window's module: [H] and [H', D]
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
    window, entry = module.window, module.entry
    run = _implementation(module)
    first = first_real(attention_mask)
    if isinstance(entry, StaticWindowLayer) or (isinstance(entry, WindowLayer) and entry.ring is not None):
        q_slots = entry.cumulative_length - query.shape[2] + torch.arange(query.shape[2], device=query.device)
        mask = None
        if isinstance(entry, StaticWindowLayer):
            mask = _allowed(q_slots, entry.slots, first, window, attention_mask, query.dtype)
        elif attention_mask is not None or entry.cumulative_length < window.width + window.sinks:
            held = ring_slots(entry.cumulative_length, window, first, key)
            mask = _allowed(q_slots, held, first, window, attention_mask, query.dtype)
        if has_constants(module):
            key, value, mask = _with_constants(module, key, value, mask, beyond(q_slots, first, window))
        return run(module, query, key, value, mask, **kwargs)
    slots = entry.slots if entry is not None else Slots(0, 0, key.shape[2])
    if slots.stop <= window.width and attention_mask is None:  # all within the window, constants have no say
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
        if has_constants(module):
            k, v, allowed = _with_constants(module, k, v, allowed, beyond(q_slots, first, window))
        found.append(run(module, part, k, v, allowed, **kwargs)[0])
    return torch.cat(found, 1), None


def beyond(q_slots: Tensor, first: Tensor | None, window: Window) -> Tensor:
    """Has the first token of its row left a query's window?  [Q], [B] -> [B or 1, Q]"""
    return q_slots[None] - (0 if first is None else first[:, None]) >= window.width


def _with_constants(
    module: Any, key: Tensor, value: Tensor, mask: Tensor | None, on: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask with one key more, for queries that are `on` [B or 1, Q]: zeros, with the head's logit.

    mask: [B or 1, 1, Q, K] -> [B or 1, H, Q, K + 1]
    """
    logits = module.sink_logits.to(value.dtype)[None, :, None].expand(len(on), -1, on.shape[1])
    logits = logits.masked_fill(~on[:, None], torch.finfo(value.dtype).min)[..., None]  # [B or 1, H, Q, 1]
    if mask is None:
        mask = logits.new_zeros(1, 1, on.shape[1], key.shape[2])
    rows = max(len(mask), len(logits))
    mask = torch.cat([mask.expand(rows, logits.shape[1], -1, -1), logits.expand(rows, -1, -1, -1)], -1)
    constant = module.sink_values.to(value.dtype)[None, :, None].expand(len(value), -1, -1, -1)
    return torch.cat([key, torch.zeros_like(key[:, :, :1])], 2), torch.cat([value, constant], 2), mask


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


def window_attention(module: Any, window: Window, fold: bool = False) -> None:
    """Give an attention module of transformers a window, in place; its weights stay.

    `fold`: with constants in place of sinks, zeros until they are loaded.  Raises ValueError where the module has no
    entry in a cache, does not go through the attention interface, or has a window of its own.
    """
    if reason := unfit(module) or (fold and unfit_constants(module)):
        raise ValueError(reason)
    module.window, module.entry, module.model_config = window, None, module.config
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = ATTENTION
    module.register_forward_pre_hook(_enter, with_kwargs=True)
    if fold:
        like = next(module.parameters())
        for name, shape in zip(CONSTANTS, constant_shapes(module), strict=True):
            setattr(module, name, nn.Parameter(like.new_zeros(shape)))


def has_constants(module: nn.Module) -> bool:
    """Does a windowed attention have constants in place of sinks?"""
    return hasattr(module, CONSTANTS[0])


def constant_shapes(module: Any) -> tuple[tuple[int], tuple[int, int]]:
    """The shapes of a module's constants: [H] and [H', D]."""
    heads = module.config.num_attention_heads
    return (heads,), (heads // module.num_key_value_groups, module.head_dim)


def unfit_constants(module: nn.Module) -> str:
    """Why an attention module cannot have constants in place of sinks; empty where it can."""
    config, name = getattr(module, "config", None), type(module).__name__
    numbers = [getattr(module, "head_dim", None), getattr(module, "num_key_value_groups", None)]
    if not all(isinstance(n, int) for n in (*numbers, getattr(config, "num_attention_heads", None))):
        return f"{name} does not say how many heads it has of what size, as constants in place of sinks need"
    if getattr(module, "attn_logit_softcapping", None) or hasattr(module, "sinks"):
        return f"{name} caps its logits or has sinks of its own, which constants in place of sinks do not join"
    return ""


def unfit(module: nn.Module) -> str:
    """Why a module cannot have a window; empty where it can."""
    name, names = type(module).__name__, inspect.unwrap(type(module).forward).__code__.co_names
    if not getattr(module, "is_causal", True):
        return f"{name} is not causal: a window of the last tokens fits only attention to what came before"
    if not isinstance(getattr(module, "layer_idx", None), int) or "ALL_ATTENTION_FUNCTIONS" not in names:
        return f"{name} does not compute attention through transformers' attention interface, so it takes no window"
    if getattr(module, "sliding_window", None) or "sliding" in str(getattr(module, "layer_type", _cached_as(module))):
        return f"{name} of layer {module.layer_idx} has a sliding window already"
    return ""


def _cached_as(module: Any) -> str:
    """The kind of attention by which a cache makes a module's entry: Mistral's one window is in its config alone."""
    config, index = getattr(module, "config", None), module.layer_idx
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return "sliding" if getattr(config, "sliding_window", None) else ""
    return str(kinds[index]) if index < len(kinds) else ""


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
