"""Generation after a shared few-shot prefix, whose keys and values are computed once for all batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from dropformer.eval.tasks.packing import common_prefix


@dataclass(frozen=True)
class PrefixCache:
    """The prompts' common prefix and its cache, for a batch of one."""

    tokens: Tensor
    cache: Cache

    def under(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor] | None:
        """Left-padded prompts [B, T] rearranged as [prefix, padding, rest], with mask; None if one lacks the prefix.

        Positions are counted by the mask, so the padding after the prefix does not shift them.
        """
        length, width = len(self.tokens), ids.shape[1]
        pads = (mask == 0).sum(1)
        if int(pads.max()) + length >= width:
            return None
        columns = torch.arange(width, device=ids.device).expand_as(ids)
        behind = (columns >= length) & (columns < length + pads[:, None])
        source = torch.where(columns < length, columns + pads[:, None], columns)
        moved = ids.gather(1, source).masked_fill(behind, int(ids[pads.argmax(), 0]))
        if not bool((moved[:, :length] == self.tokens.to(ids.device)).all()):
            return None
        return moved, (~behind).to(mask.dtype)

    def cache_for(self, batch: int) -> Cache:
        """The cache for a batch, sharing tensors; generation appends to new ones."""
        return expanded(self.cache, batch)


def longest_stem(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the prompts' common prefix, leaving at least one token of each to compute."""
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    return min(common_prefix(low, high), min(map(len, prompts)) - 1)


def expanded(cache: Cache, batch: int) -> Cache:
    """A copy of a one-sequence cache, expanded to `batch` sequences without copying tensors."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in twin.layers:
        for name in ("keys", "values"):
            held = getattr(layer, name, None)
            if isinstance(held, Tensor) and held.numel():
                setattr(layer, name, held.expand(batch, -1, -1, -1))
    return twin
