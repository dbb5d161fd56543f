"""A KV cache of constant size: attention sinks and a rolling window (StreamingLLM, arXiv 2309.17453).

The first tokens (attention sinks) and the most recent ones are kept; the others are evicted.  Positions are slots of
the cache, so they never exceed its size: keys are stored without the rotary embedding and rotated by slot on reading.

No `forward` is copied.  How a model rotates its keys is measured: one token is computed at two positions, and the
cached keys must differ by exactly one of the rotations that the model's frequencies allow.  Other models are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from dropformer.prune.errors import ArchitectureError, EvaluationError, reason
from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.parts import empty_cache

_POSITIONS = (0, 37)  # where the probe token is computed
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; 16-bit keys get the default
_TOLERANCE_16_BIT = 4e-2


@dataclass(frozen=True)
class Sinks:
    """sinks: first tokens that are always kept; window: recent tokens kept, including those being computed.

    chunk: tokens per forward pass.  The first token of a chunk attends to window - chunk recent tokens, the last one
    to window - 1; the paper uses chunk 1.
    """

    sinks: int = 4
    window: int = 1020
    chunk: int = 256

    def __post_init__(self) -> None:
        if self.sinks < 0 or not 1 <= self.chunk <= self.window:
            raise EvaluationError(
                f"cannot stream with {self.sinks} sinks, a window of {self.window} and chunks of {self.chunk}; "
                "expected 0 or more sinks and 1 <= chunk <= window"
            )

    @property
    def size(self) -> int:
        """Most tokens in the cache."""
        return self.sinks + self.window

    def __str__(self) -> str:
        return f"{self.sinks} sinks + {self.window} recent tokens"


def fitting(model: nn.Module, size: int | None = None) -> Sinks:
    """4 sinks and a window, together `size` tokens (None: 1024, or the model's context if shorter).

    Raises EvaluationError for more than the context.
    """
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 1024
    if size and size > context:
        raise EvaluationError(f"a window of {size} tokens is more than the model's context of {context}; give less")
    window = max(1, (size or min(1024, context)) - 4)
    return Sinks(4, window, min(256, max(1, window // 4)))


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding's rotation of keys (arXiv 2104.09864): angle = position x frequency.

    pairing: the two numbers of a pair are half the rotated width apart ("half") or adjacent ("interleaved"); "none"
    does not rotate (a layer without positions).
    """

    frequencies: Tensor  # [r], so that the first 2r numbers of a head are rotated
    pairing: Literal["half", "interleaved", "none"]

    def turn(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys [B, H, T, D] by positions [T] (negative: back), computed in float32."""
        if self.pairing == "none":
            return keys
        angles = positions.to(torch.float32)[:, None] * self.frequencies.to(keys.device)
        cos, sin = angles.cos(), angles.sin()
        first, second = self._pair(keys.float())
        turned = keys.float().clone()
        target_first, target_second = self._pair(turned)
        target_first.copy_(first * cos - second * sin)
        target_second.copy_(second * cos + first * sin)
        return turned.to(keys.dtype)

    def _pair(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the two elements of every rotated pair, each [..., r]."""
        r = len(self.frequencies)
        if self.pairing == "half":
            return keys[..., :r], keys[..., r : 2 * r]
        return keys[..., 0 : 2 * r : 2], keys[..., 1 : 2 * r : 2]


class SinkLayer(DynamicLayer):
    """One layer's cache: keys without rotation, and values, of the kept tokens."""

    def __init__(self, shape: Sinks, rotation: Rotation) -> None:
        super().__init__()
        self.shape, self.rotation = shape, rotation

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens and return all keys, rotated by slot, and values.

        The model has rotated `key_states` by the slots after those filled, because this layer reports that length.
        Then tokens are evicted to make room for the next chunk.
        """
        start = self.get_seq_length()
        slots = torch.arange(start + key_states.shape[-2], device=key_states.device)
        plain = self.rotation.turn(key_states, -slots[start:])
        keys, values = super().update(plain, value_states)
        self._evict()
        return self.rotation.turn(keys, slots), values

    def _evict(self) -> None:
        assert self.keys is not None and self.values is not None
        recent = self.shape.window - self.shape.chunk
        if self.get_seq_length() <= self.shape.sinks + recent:
            return
        self.keys = self._kept(self.keys, recent)
        self.values = self._kept(self.values, recent)

    def _kept(self, states: Tensor, recent: int) -> Tensor:
        tail = states.shape[-2] - recent
        return torch.cat([states[..., : self.shape.sinks, :], states[..., tail:, :]], dim=-2)


def sink_cache(model: nn.Module, shape: Sinks) -> Cache:
    """An empty cache for `model`, to pass as `past_key_values` with at most `shape.chunk` tokens at a time.

    Dropped attention layers keep their empty entry, linear-attention layers their state.  Raises ArchitectureError,
    with layer and reason, for a model whose keys are not rotated by position.
    """
    rotations = key_rotations(model)
    layers = empty_cache(model).layers
    return Cache(layers=[_sink_layer(layer, rotations.get(i), shape) for i, layer in enumerate(layers)])


def _sink_layer(layer: Any, rotation: Rotation | None, shape: Sinks) -> Any:
    if not isinstance(layer, CacheLayerMixin) or rotation is None:
        return layer
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        raise ArchitectureError(
            "cannot stream: a layer mixes linear attention with attention; expected attention or linear layers"
        )
    return SinkLayer(shape, rotation)


@torch.inference_mode()
def key_rotations(model: nn.Module) -> dict[int, Rotation]:
    """The key rotation of each layer that caches keys, by its index in the cache; measured, see the module.

    Raises ArchitectureError if a layer's keys do not follow any rotation of the model's frequencies, if its values
    depend on the position, or if the model does not take positions from the cache's length.
    """
    before, after = (_probe(model, position) for position in _POSITIONS)
    candidates = list(_candidates(model))
    found: dict[int, Rotation] = {}
    for index, (start, end) in enumerate(zip(before, after, strict=True)):
        if start is None or end is None:
            continue
        found[index] = _fitting(candidates, start, end, _refusal(model, f"the keys of layer {index}"))
        if not _close(start.values, end.values):
            raise _refusal(model, f"the values of layer {index}")
    _check_default_positions(model, found)
    return found


@dataclass(frozen=True)
class _Cached:
    """A layer's cache entry for single tokens.  [B, H, 1, D]"""

    keys: Tensor
    values: Tensor


def _fitting(candidates: list[Rotation], start: _Cached, end: _Cached, refusal: ArchitectureError) -> Rotation:
    turn = torch.tensor([_POSITIONS[1] - _POSITIONS[0]], device=start.keys.device)
    for rotation in candidates:
        if 2 * len(rotation.frequencies) <= start.keys.shape[-1] and _close(rotation.turn(start.keys, turn), end.keys):
            return rotation
    raise refusal


def _check_default_positions(model: nn.Module, rotations: dict[int, Rotation]) -> None:
    """Check that a forward pass without position_ids continues from the length of the cache.

    Only the first caching layer can show it (deeper keys depend on the earlier tokens), and only if no
    linear-attention layer comes before it.
    """
    layers = empty_cache(model).layers
    first = min(rotations, default=None)
    if first is None or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers[:first]):
        return
    cache, ids = empty_cache(model), _probe_ids(model)
    for tokens in (ids.expand(-1, 5), ids):
        _forward(model, input_ids=tokens, past_key_values=cache)
    keys = getattr(cache.layers[first], "keys", None)
    asked = _probe(model, 5)[first]
    if keys is None or asked is None or not _close(keys[..., -1:, :], asked.keys):
        raise _refusal(model, f"positions given to layer {first}", "are not those it counts itself")


def _refusal(model: nn.Module, what: str, why: str = "do not rotate with the position alone") -> ArchitectureError:
    return ArchitectureError(
        f"{type(model).__name__} cannot stream: {what} {why}; attention sinks need rotary positions, or none"
    )


def _close(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape:
        return False
    error = (one.float() - two.float()).norm()
    return bool(error <= _TOLERANCE.get(two.dtype, _TOLERANCE_16_BIT) * two.float().norm())


def _candidates(model: nn.Module) -> Iterator[Rotation]:
    """No rotation, then every set of frequencies in both pairings and both directions."""
    yield Rotation(torch.zeros(0), "none")
    for frequencies in _frequencies(model):
        for signed in (frequencies, -frequencies):  # NanoChat rotates in the other direction
            yield Rotation(signed, "half")
            yield Rotation(signed, "interleaved")


def _frequencies(model: nn.Module) -> Iterator[Tensor]:
    """The model's frequency buffers; for GPT-J and CodeGen, which store tables instead, by their formula."""
    seen: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or name.endswith("original_inv_freq") or buffer.dim() != 1:
            continue
        frequencies = buffer.detach().float()
        if not any(torch.equal(frequencies, other) for other in seen):
            seen.append(frequencies)
            yield frequencies
    rotated = getattr(model.config, "rotary_dim", None)
    if rotated:
        yield 10000.0 ** (-torch.arange(0, rotated, 2, device=input_device(model)) / rotated)


def _probe_ids(model: nn.Module) -> Tensor:
    """Three sequences of one token.  [3, 1]"""
    return torch.arange(1, 4, device=input_device(model))[:, None]


def _probe(model: nn.Module, position: int) -> list[_Cached | None]:
    """Each layer's cache entry for single tokens at `position`; None if it caches no keys."""
    ids = _probe_ids(model)
    cache = empty_cache(model)
    _forward(model, input_ids=ids, position_ids=torch.full_like(ids, position), past_key_values=cache)
    return [_cached(layer) for layer in cache.layers]


def _forward(model: nn.Module, **inputs: Any) -> None:
    try:
        model(**inputs, use_cache=True)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise ArchitectureError(
            f"{type(model).__name__} cannot stream: a token at a given position cannot be run "
            f"({reason(error, 100)}); attention sinks need a decoder with rotary positions, or none"
        ) from error


def _cached(layer: Any) -> _Cached | None:
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, Tensor) or keys.dim() != 4 or not keys.numel():
        return None
    return _Cached(keys, layer.values)
