"""The cache entries of attention layers that see the last W tokens and the first S.

Self-contained, as `modeling.py` is: every checkpoint of dropformer's own type carries a copy.

Slots number the positions of a sequence from 0, padding included.  In a left-padded row the sinks are the first S
real tokens:

    row   pad pad  a   b   c   d   e        W = 2, S = 1
    slot   0   1   2   3   4   5   6        e sees a (the sink), d and e

Once tokens leave the window, single tokens are written into a ring behind the sinks: slot s lies at s % W, where it
replaces the one that left, so that a step copies nothing.  W = 3, S = 1, after slot 6: slots 0 | 6 4 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer


@dataclass(frozen=True)
class Window:
    """The last `width` tokens, the token itself included, and the first `sinks`."""

    width: int
    sinks: int = 0


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


def tokens_at(states: Tensor, places: Tensor) -> Tensor:
    """The tokens at these places, the nearest for places outside: [B, H, T, D], [B, S] -> [B, H, S, D]"""
    at = places.clamp(0, states.shape[2] - 1)[:, None, :, None]
    return states.gather(2, at.expand(len(states), states.shape[1], -1, states.shape[3]))


def _last(states: Tensor, count: int) -> Tensor:
    """The last tokens in memory of their own, so that a long prompt's are freed."""
    whole = states.shape[-2]
    return states if count >= whole else states[..., whole - count :, :].clone()


def ring_slots(length: Any, window: Window, first: Tensor | None, like: Tensor) -> Tensor:
    """The slot of each entry of a ring, sinks first, once `length` tokens were written, -1 for none.  [B or 1, S + W]

    length: a number or a tensor of one.  A sink that the window still holds is in the ring alone.
    """
    width, last = window.width, length - 1
    ring = last - (last - torch.arange(width, device=like.device)) % width
    ring = torch.where((ring >= 0) & (length > 0), ring, -1)[None]
    if not window.sinks:
        return ring
    sinks = sink_slots(first, window.sinks, like)
    sinks = torch.where((sinks < length) & (sinks <= last - width), sinks, -1)
    return torch.cat([sinks, ring.expand(len(sinks), -1)], 1)


class WindowLayer(DynamicLayer):
    """A cache entry of S + W tokens: the sinks, and the last W.

    keys, values: [B, H, <= W, D], in order; sink_keys, sink_values: [B, H, S, D].  In single steps beyond the window
    the four are views of `ring`: keys and values [B, H, S + W, D], sinks first.
    """

    is_sliding = True
    keys: Tensor
    values: Tensor

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window, self.cumulative_length, self.record_past = window, 0, False
        self.first: Tensor | None = None  # [B], the first real slot of each row, where rows are padded
        self.sink_keys: Tensor | None = None
        self.sink_values: Tensor | None = None
        self.slots = Slots(0, 0, 0)  # of what `update` returned, unless that is the ring
        self.ring: tuple[Tensor, Tensor] | None = None
        self.alone = True  # no copy of this entry has the same ring

    def __copy__(self) -> Any:
        """An entry with the same tensors; whichever of the two grows first takes a ring of its own."""
        self.alone = False
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def activate_past_recording(self) -> None:
        """Keep what leaves the window until `crop`, so that rejected drafts can be taken back."""
        self._unroll()
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, total = key_states.shape[-2], self.cumulative_length + key_states.shape[-2]
        width, sinks = self.window.width, self.window.sinks
        graph = torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad)
        if new == 1 and total > width and not self.record_past and not graph:
            return self._turn(key_states, value_states)
        self._unroll()
        keys, values = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        self._keep_sinks(key_states, value_states)
        self.cumulative_length = total
        seen = min(keys.shape[-2], width - 1 + new)
        self.slots = Slots(sinks if total > width else 0, total - seen, total)
        kept = keys.shape[-2] if self.record_past else min(keys.shape[-2], width)
        self.keys, self.values = _last(keys, kept), _last(values, kept)
        keys, values = keys[..., keys.shape[-2] - seen :, :], values[..., values.shape[-2] - seen :, :]
        if not self.slots.sinks:
            return keys, values
        assert self.sink_keys is not None and self.sink_values is not None
        return torch.cat([self.sink_keys, keys], -2), torch.cat([self.sink_values, values], -2)

    def _turn(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token into the ring, and return all of it."""
        width, place = self.window.width, self.cumulative_length % self.window.width
        ring = self.ring
        if ring is None:
            self._keep_sinks(key, value)
            keys = _rolled(self.sink_keys, key, self.keys, width, place)
            ring = self._point(keys, _rolled(self.sink_values, value, self.values, width, place))
        else:
            if not self.alone or (self.keys.is_inference() and not torch.is_inference_mode_enabled()):
                ring = self._point(*(buffer.clone() for buffer in ring))
            self._keep_sinks(key, value)
            self.keys[..., place, :], self.values[..., place, :] = key[..., 0, :], value[..., 0, :]
        self.cumulative_length += 1
        return ring

    def _point(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take these as the ring."""
        sinks = self.window.sinks
        self.ring, self.alone = (keys, values), True
        self.keys, self.values = keys[..., sinks:, :], values[..., sinks:, :]
        if sinks:
            self.sink_keys, self.sink_values = keys[..., :sinks, :], values[..., :sinks, :]
        return keys, values

    def _unroll(self) -> None:
        """From a ring to tokens in order."""
        if self.ring is not None:
            oldest, self.ring = self.cumulative_length % self.window.width, None
            self.keys, self.values = self.keys.roll(-oldest, -2), self.values.roll(-oldest, -2)
            for name in ("sink_keys", "sink_values") if self.window.sinks else ():
                setattr(self, name, getattr(self, name).clone())

    def _keep_sinks(self, keys: Tensor, values: Tensor) -> None:
        """Store those of the new tokens that are among the first S of their rows."""
        if not self.window.sinks or (self.first is None and self.cumulative_length >= self.window.sinks):
            return
        place = sink_slots(self.first, self.window.sinks, keys) - self.cumulative_length  # [B, S], among the new
        here = ((place >= 0) & (place < keys.shape[-2]))[:, None, :, None]
        for name, new in (("sink_keys", keys), ("sink_values", values)):
            old = getattr(self, name)
            kept = torch.where(here, tokens_at(new, place), 0.0 if old is None else old)
            setattr(self, name, kept if self.ring is None else old.copy_(kept))

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
        if self.is_initialized and self.ring is None:
            kept = self.keys.shape[-2] - remove
            self.keys, self.values = self.keys[..., :kept, :], self.values[..., :kept, :]
            self.keys, self.values = _last(self.keys, min(kept, width)), _last(self.values, min(kept, width))

    def reset(self) -> None:
        super().reset()
        self.cumulative_length, self.ring = 0, None
        self.first, self.sink_keys, self.sink_values = None, None, None

    def offload(self) -> None:
        """Windows are small: nothing leaves the device, and `prefetch` brings nothing back."""

    prefetch = offload

    def reorder_cache(self, beam_idx: Any) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices])

    def _each(self, change: Any) -> None:
        self._unroll()
        for name in ("keys", "values", "sink_keys", "sink_values", "first"):
            if isinstance(found := getattr(self, name), Tensor) and self.is_initialized:
                setattr(self, name, change(found))


def _rolled(sinks: Tensor | None, new: Tensor, states: Tensor, width: int, place: int) -> Tensor:
    """A ring of the sinks, the new token at its place, and the last W - 1 before it around it."""
    last = states[..., states.shape[-2] - (width - 1) :, :]
    before = width - 1 - place  # tokens that lie behind the new one
    parts = [last[..., before:, :], new, last[..., :before, :]]
    return torch.cat(parts if sinks is None else [sinks, *parts], -2)


class StaticWindowLayer(StaticLayer):
    """As `WindowLayer` in one fixed buffer for compiled decoding: S sinks, then a ring of W tokens.

    The token of slot s lies in the ring at s % W, so writing one replaces the one that left the window.
    keys, values: [B, H, S + W, D].
    """

    is_sliding = True
    keys: Tensor
    values: Tensor

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
        return ring_slots(length, self.window, self.first, self.keys)

    def _write(self, keys: Tensor, values: Tensor, before: Tensor) -> None:
        new, sinks, width = keys.shape[-2], self.window.sinks, self.window.width
        last = min(new, width)
        place = sinks + (before + torch.arange(new - last, new, device=self.device)) % width
        self.keys.index_copy_(2, place, keys[..., new - last :, :])
        self.values.index_copy_(2, place, values[..., new - last :, :])
        if sinks:
            at = sink_slots(self.first, sinks, keys) - before
            here = ((at >= 0) & (at < new))[:, None, :, None]
            for buffer, source in ((self.keys, keys), (self.values, values)):
                buffer[:, :, :sinks].copy_(torch.where(here, tokens_at(source, at), buffer[:, :, :sinks]))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.longest, 0

    def get_max_length(self) -> int:
        return self.longest

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.first = None if self.first is None else self.first.index_select(0, beam_idx.to(self.first.device))


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
