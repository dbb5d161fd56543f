"""Attention of a few new tokens behind a long cache, without a copy of the cache for every query head.

A verifying pass needs a mask, and transformers' sdpa repeats keys and values for each query head where there is one:
behind 8,192 tokens five tokens of SmolLM2 took 31 ms a layer, of which the copies were most.  The queries that share a
key-value head are rows of one head instead (grouped-query attention, arXiv 2305.13245), which took 4.6 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ROWS = 16  # tokens of a pass up to which such copies cost more than attention itself
FURTHER = ("position_bias", "softcap", "cache", "s_aux")  # arguments of transformers' sdpa that need its own code


def grouped_attention(
    sdpa: Callable, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """As transformers' sdpa: queries [B, H, T, D], keys and values [B, H', S, D], mask [B, 1, T, S] -> [B, T, H, D].

    Example of 4 heads, 2 key-value heads and 3 tokens: heads 0 and 1 read the same keys, so that [B, 4, 3, D] becomes
    [B, 2, 6, D], and the mask's three rows follow one another twice.  Memory: that mask; no copy of keys or values.
    """
    heads, tokens = query.shape[1:3]
    groups = heads // key.shape[1]
    mask, further = attention_mask, any(given.get(name) is not None for name in FURTHER)
    if mask is None or mask.shape[1] != 1 or groups == 1 or tokens > ROWS or further:
        return sdpa(module, query, key, value, attention_mask, **given)
    rows = query.reshape(len(query), heads // groups, groups * tokens, -1)
    found = scaled_dot_product_attention(
        rows, key, value, mask.repeat(1, 1, groups, 1), given.get("dropout") or 0.0, scale=given.get("scaling")
    )
    return found.reshape(len(query), heads, tokens, -1).transpose(1, 2).contiguous(), None


@contextmanager
def grouped_queries() -> Iterator[None]:
    """Inside the `with` transformers' sdpa is `grouped_attention`.

    A model's settings stay: some families' code asks whether its attention is "sdpa" before it makes a mask.
    """
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(grouped_attention, sdpa)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa
