"""Attention of a few new tokens behind a long cache, without a copy of the cache for every query head.

A verifying pass needs a mask, and transformers' sdpa repeats keys and values for each query head where there is one:
behind 8,192 tokens five tokens of SmolLM2 took 31 ms a layer, of which the copies were most.  The queries that share a
key-value head are rows of one head instead (grouped-query attention, arXiv 2305.13245), which took 4.6 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "dropformer_grouped"
ROWS = 16  # tokens of a pass up to which such copies cost more than attention itself
FURTHER = ("position_bias", "softcap", "cache", "s_aux")  # arguments of transformers' sdpa that need its own code


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """As transformers' sdpa: queries [B, H, T, D], keys and values [B, H', S, D], mask [B, 1, T, S] -> [B, T, H, D].

    Example of 4 heads, 2 key-value heads and 3 tokens: heads 0 and 1 read the same keys, so that [B, 4, 3, D] becomes
    [B, 2, 6, D], and the mask's three rows follow one another twice.  Memory: that mask; no copy of keys or values.
    """
    heads, tokens = query.shape[1:3]
    groups = heads // key.shape[1]
    mask = attention_mask
    if mask is None or mask.shape[1] != 1 or groups == 1 or tokens > ROWS or any(map(given.get, FURTHER)):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **given)
    rows = query.reshape(len(query), heads // groups, groups * tokens, -1)
    found = scaled_dot_product_attention(
        rows, key, value, mask.repeat(1, 1, groups, 1), given.get("dropout") or 0.0, scale=given.get("scaling")
    )
    return found.reshape(len(query), heads, tokens, -1).transpose(1, 2).contiguous(), None


@contextmanager
def grouped_queries(model: Any) -> Iterator[None]:
    """Inside the `with` a decoder that computes attention by transformers' sdpa computes it by `grouped_attention`."""
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = "sdpa"
