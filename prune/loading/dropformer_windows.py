"""Attention layers that see the last W tokens and the first S: sliding windows with attention sinks.

Self-contained, as `modeling.py` is: every checkpoint with such a layer carries a copy.  A windowed layer keeps its
own module and weights.  Its attention runs through a function of its own in transformers' attention interface,
which masks and skips what lies outside the window and leaves the rest to the implementation that the model uses;
its cache entry holds S + W tokens.  Keys keep the rotary positions that they were written with (attention sinks:
arXiv 2309.17453, which renumbers them instead).

Slots number the positions of a sequence from 0, padding included.  In a left-padded row the sinks are the first S
real tokens:

    row   pad pad  a   b   c   d   e        W = 2, S = 1
    slot   0   1   2   3   4   5   6        e sees a (the sink), d and e
"""

from __future__ import annotations

import copy
import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "dropformer_windows"
BAND = 256  # queries computed at once where a window is narrower than that


@dataclass(frozen=True)
class Window:
    """The last `width` tokens, the token itself included, and the first `sinks`."""

    width: int
    sinks: int = 0


class WindowLayer(DynamicLayer):
    """A cache entry of S + W tokens: the sinks, and the last W - 1 tokens before the next one.

    keys, values: [B, H, <= W - 1, D]; sink_keys, sink_values: [B, H, S, D].
    """

    is_sliding = True

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window, self.cumulative_length, self.record_past = window, 0, False
        self.first: Tensor | None = None  # [B], the first real slot of each row, where rows are padded
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        self.slots = Slots(0, 0, 0)

    def activate_past_recording(self) -> None:
        """Keep what leaves the window until `crop`, so that rejected drafts can be taken back."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, total = key_states.shape[-2], self.cumulative_length + key_states.shape[-2]
        width, sinks = self.window.width, self.window.sinks
        keys, values = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        self._keep_sinks(key_states, value_states)
        self.cumulative_length = total
        seen = min(keys.shape[-2], width - 1 + new)
        self.slots = Slots(sinks if total > width else 0, total - seen, total)
        kept = keys.shape[-2] if self.record_past else min(keys.shape[-2], width - 1)
        self.keys, self.values = _last(keys, kept), _last(values, kept)
        keys, values = keys[..., keys.shape[-2] - seen :, :], values[..., values.shape[-2] - seen :, :]
        if not self.slots.sinks:
            return keys, values
        return torch.cat([self.sink_keys, keys], -2), torch.cat([self.sink_values, values], -2)  # type: ignore[list-item]

    def _keep_sinks(self, keys: Tensor, values: Tensor) -> None:
        """Store those of the new tokens that are among the first S of their rows."""
        if not self.window.sinks or (self.first is None and self.cumulative_length >= self.window.sinks):
            return
        place = sink_slots(self.first, self.window.sinks, keys) - self.cumulative_length  # [B, S], among the new
        here = ((place >= 0) & (place < keys.shape[-2]))[:, None, :, None]
        at = place.clamp(0, keys.shape[-2] - 1)[:, None, :, None]
        for name, new in (("sink_keys", keys), ("sink_values", values)):
            found = new.gather(2, at.expand(-1, new.shape[1], -1, new.shape[3]))
            old = getattr(self, name)
            setattr(self, name, torch.where(here, found, torch.zeros_like(found) if old is None else old))

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of an entry that holds everything: the model's mask tells which slots are padding."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative number).  Raises RuntimeError where the window has left them."""
        remove, width = abs(tokens_to_remove), self.window.width
        if remove and self.cumulative_length > width and not self.record_past:
            raise RuntimeError("a windowed cache entry can be cropped only after activate_past_recording()")
        self.cumulative_length -= remove
        kept = self.keys.shape[-2] - remove if self.is_initialized else 0
        if self.is_initialized:
            self.keys, self.values = self.keys[..., :kept, :], self.values[..., :kept, :]
            self.keys, self.values = _last(self.keys, min(kept, width - 1)), _last(self.values, min(kept, width - 1))

    def reset(self) -> None:
        super().reset()
        self.cumulative_length, self.first, self.sink_keys, self.sink_values = 0, None, None, None

    def offload(self) -> None:
        """Windows are small: nothing leaves the device."""

    def prefetch(self) -> None:
        """Nothing was offloaded."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices])

    def _each(self, change: Any) -> None:
        for name in ("keys", "values", "sink_keys", "sink_values", "first"):
            if isinstance(found := getattr(self, name), Tensor) and self.is_initialized:
                setattr(self, name, change(found))


class StaticWindowLayer(StaticLayer):
    """As `WindowLayer` in one fixed buffer for compiled decoding: S sinks, then a ring of W tokens.

    The token of slot s lies in the ring at s % W, so writing one replaces the one that left the window.
    keys, values: [B, H, S + W, D].
    """

    is_sliding = True

    def __init__(self, window: Window, max_cache_len: int) -> None:
        super().__init__(window.sinks + window.width)
        self.window, self.longest = window, max_cache_len
        self.first: Tensor | None = None
        self.slots: Any = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, before = key_states.shape[-2], self.cumulative_length.clone()
        old_slots = self._held(before)
        keys, values = key_states, value_states
        if new > 1:  # what is overwritten below is still seen by the first of the new tokens
            keys, values = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
        self._write(key_states, value_states, before)
        self.cumulative_length.add_(new)
        if new == 1:
            self.slots = self._held(before + 1)
            return self.keys, self.values
        added = (before + torch.arange(new, device=self.device)).expand(len(old_slots), -1)
        self.slots = torch.cat([old_slots, added], 1)
        return keys, values

    def _held(self, length: Tensor) -> Tensor:
        """The slot of each entry of the buffer once `length` tokens were written, -1 for none.  [B or 1, S + W]"""
        width, last = self.window.width, length - 1
        ring = last - (last - torch.arange(width, device=self.device)) % width
        ring = torch.where((ring >= 0) & (length > 0), ring, -1)[None]
        if not self.window.sinks:
            return ring
        sinks = sink_slots(self.first, self.window.sinks, self.keys)
        sinks = torch.where((sinks < length) & (sinks <= last - width), sinks, -1)  # in the ring otherwise
        return torch.cat([sinks, ring.expand(len(sinks), -1)], 1)

    def _write(self, keys: Tensor, values: Tensor, before: Tensor) -> None:
        new, sinks, width = keys.shape[-2], self.window.sinks, self.window.width
        last = min(new, width)
        place = sinks + (before + torch.arange(new - last, new, device=self.device)) % width
        self.keys.index_copy_(2, place, keys[..., new - last :, :])
        self.values.index_copy_(2, place, values[..., new - last :, :])
        if sinks:
            at = sink_slots(self.first, sinks, keys) - before
            here, at = ((at >= 0) & (at < new))[:, None, :, None], at.clamp(0, new - 1)[:, None, :, None]
            for buffer, source in ((self.keys, keys), (self.values, values)):
                found = source.gather(2, at.expand(len(source), source.shape[1], -1, source.shape[3]))
                buffer[:, :, :sinks].copy_(torch.where(here, found, buffer[:, :, :sinks]))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.longest, 0

    def get_max_length(self) -> int:
        return self.longest

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.first = None if self.first is None else self.first.index_select(0, beam_idx.to(self.first.device))


@dataclass(frozen=True)
class Slots:
    """Which slots the returned keys have: `sinks` of them first, then every slot from `start` to `stop`."""

    sinks: int
    start: int
    stop: int


def sink_slots(first: Tensor | None, sinks: int, like: Tensor) -> Tensor:
    """The first real slots of each row, [B or 1, S]."""
    slots = torch.arange(sinks, device=like.device)[None]
    return slots.expand(len(like), -1) if first is None else first[:, None] + slots


def _last(states: Tensor, count: int) -> Tensor:
    """The last tokens in memory of their own, so that a long prompt's are freed."""
    whole = states.shape[-2]
    return states if count >= whole else states[..., whole - count :, :].clone()


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
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
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
        at = (sink_slots(first, window.sinks, key) - slots.start).clamp(0, key.shape[2] - 1)[:, None, :, None]
        sinks = tuple(t.gather(2, at.expand(-1, t.shape[1], -1, t.shape[3])) for t in (key, value))  # type: ignore[assignment]
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
        mask = None if one else _allowed(q_slots, near, first, window, rows, query.dtype)
        found.append(run(module, part, k, v, mask, **kwargs)[0])
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


def _implementation(module: nn.Module) -> Any:
    """What computes attention elsewhere in the model; its sdpa where that has no masks (flash attention)."""
    name = module.model_config._attn_implementation
    return (
        sys.modules[type(module).__module__].eager_attention_forward
        if name == "eager"
        else ALL_ATTENTION_FUNCTIONS["sdpa"]
    )


def window_attention(module: nn.Module, window: Window) -> None:
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
    if not isinstance(getattr(module, "layer_idx", None), int) or "ALL_ATTENTION_FUNCTIONS" not in names:
        return f"{name} does not compute attention through transformers' attention interface, so it takes no window"
    if getattr(module, "sliding_window", None) or "sliding" in str(getattr(module, "layer_type", "")):
        return f"{name} of layer {module.layer_idx} has a sliding window already"
    if not getattr(module, "is_causal", True):
        return f"{name} is not causal: a window of the last tokens fits only attention to what came before"
    return ""


def _enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a windowed attention: its cache entry is one of a window, and knows where each row begins."""
    cache = kwargs.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)
    module.entry = None
    if cache is None:
        return
    entry = window_entry(cache, module.layer_idx, module.window)  # type: ignore[arg-type]
    if isinstance(entry, (WindowLayer, StaticWindowLayer)):
        entry.first = first_real(kwargs.get("attention_mask"))
        module.entry = entry
    elif type(entry) is not DynamicLayer:  # a dynamic one that another model filled holds every token
        raise ValueError(f"layer {module.layer_idx} has a window, which {type(entry).__name__} cannot hold")


def window_entry(cache: Any, index: int, window: Window) -> Any:
    """The cache's entry of a layer, made one of a window while it is empty; one that holds tokens stays as it is."""
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    old = cache.layers[index]
    if isinstance(old, StaticLayer) and not isinstance(old, StaticWindowLayer):
        if old.is_initialized and int(old.cumulative_length):
            raise ValueError(f"layer {index} has a window, and its static cache was filled without; give a new cache")
        cache.layers[index] = StaticWindowLayer(window, old.max_cache_len)
    elif type(old) is DynamicLayer and not old.get_seq_length():
        cache.layers[index] = WindowLayer(window)
    return cache.layers[index]


def prepare_windows(model: nn.Module, cache: Any, recording: bool = False) -> None:
    """Make a new cache's entries fit the model's windows before anything is written into it."""
    cache = getattr(cache, "self_attention_cache", cache)
    for module in model.modules():
        if isinstance(getattr(module, "window", None), Window):
            window_entry(cache, module.layer_idx, module.window)  # type: ignore[arg-type]
    if recording:
        cache.activate_past_recording()


AttentionInterface.register(ATTENTION, windowed_attention)
