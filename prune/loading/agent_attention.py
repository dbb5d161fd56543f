"""Attention through agents: a few pooled queries stand between the queries and the keys (arXiv 2312.08874, eq. 3).

Self-contained, as `modeling.py` is.  With A the queries averaged to N of them,

    softmax(Q A^T / sqrt(D)) softmax(A K^T / sqrt(D)) V,

so that T tokens cost 2 N T pairs in place of T^2: less where T > 2 N.  The layer keeps its module, its weights and its
scale, and goes through a function of its own in transformers' attention interface.  What the paper learns beside that
(a convolution of V, biases) is left out: there is nothing to take it from.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = f"agents of {__name__}"  # a copy beside a checkpoint has a name of its own
APART = 8  # at most so many tokens beside an image's patches: class and distillation tokens, registers
# What attention functions of transformers take that changes which tokens are seen, or how much.
OTHER = ("position_bias", "softcap", "s_aux", "sinks", "sliding_window", "cu_seq_lens_q", "indices", "block_indices")

BIAS = re.compile("relative|position_bias|rel_pos")


class NoAgents(ValueError):
    """An attention that cannot be computed through agents."""


def through_agents(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention through `module.agents` agents: [B, H, T, D], [B, H', T, D] -> [B, T, H, D], as the interface has it.

    Time and memory grow with T.  Padded keys are seen by no agent and padded queries enter into none, so that padding
    changes nothing.  Raises NoAgents for a mask of anything but padding, and for what attends to other tokens.
    """
    check(module, query, key, kwargs)
    real = real_tokens(attention_mask)
    agents = pooled(query, module.agents, real, module.has_patches)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    attend = partial(F.scaled_dot_product_attention, dropout_p=kwargs.get("dropout", 0.0), scale=kwargs.get("scaling"))
    told = attend(agents, key, value, attn_mask=None if real is None else real[:, None, None])
    return attend(query, agents, told).transpose(1, 2).contiguous(), None


def check(module: Any, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    """Raises NoAgents for causal attention, for cross-attention, and for terms beside the softmax of scores (OTHER)."""
    name = type(module).__name__
    if kwargs.get("is_causal"):
        raise NoAgents(f"{name} is causal, and agents are averages of all tokens, later ones too")
    if query.shape[2] != key.shape[2]:
        raise NoAgents(
            f"{name} attends to {key.shape[2]} tokens from {query.shape[2]}: agents fit self-attention alone"
        )
    if other := next((word for word in OTHER if kwargs.get(word) is not None), None):
        raise NoAgents(f"{name} attends by `{other}`, which does not go through agents")


def real_tokens(mask: Tensor | None) -> Tensor | None:
    """Which keys are no padding, [B, K] booleans; None where all are real.

    mask: [B, K] of real tokens, or [B, H, Q, K], booleans or additive.  Raises NoAgents where queries or heads differ
    in what they see.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise NoAgents(f"agents know masks of padding alone, and this {type(mask).__name__} is none")
    additive = mask.is_floating_point() and mask.ndim == 4
    seen = mask if mask.dtype == torch.bool else (mask > -1 if additive else mask > 0)
    if mask.ndim == 2:
        return seen
    if mask.shape[1] > 1 and mask.stride(1):
        raise NoAgents("agents know masks of padding alone, and here heads differ in what they see")
    keys = seen[:, 0, 0]
    if not mask.is_meta and not _only_padding(mask, seen, keys):
        raise NoAgents("agents know masks of padding alone, and here tokens differ in what they see")
    return keys


def _only_padding(mask: Tensor, seen: Tensor, keys: Tensor) -> bool:
    """Is a mask [B, H, Q, K] that of its keys alone?  Asked once for all layers that get the same mask."""
    known = getattr(mask, "only_padding", None)
    if known is None:
        known = bool((seen == keys[:, None, None]).all())
        if known and mask.is_floating_point():  # an additive one may hold a bias of positions
            known = bool((mask.masked_fill(~seen, 0) == 0).all())
        mask.only_padding = known  # type: ignore[attr-defined]
    return known


def pooled(query: Tensor, count: int, real: Tensor | None = None, has_patches: bool = False) -> Tensor:
    """Queries [B, H, T, D] averaged to [B, H, count, D], in adaptive pools that cover all tokens.

    The patches of a square image in a square of pools where `count` is a square too, without the few tokens before
    them; other tokens along the sequence.  Where some are padding, over each row's real ones.

    With 5 tokens and 2 agents: the means of tokens 0 to 2 and of 2 to 4.
    """
    if real is not None:
        return pools(real, count).to(query.dtype)[:, None] @ query
    batch, heads, tokens, size = query.shape
    apart, (high, wide), shape = _grid(tokens, count, has_patches)
    patches = query[:, :, apart:].transpose(1, 2).reshape(batch, high, wide, heads * size).permute(0, 3, 1, 2)
    found = F.adaptive_avg_pool2d(patches, shape)
    return found.flatten(2).transpose(1, 2).reshape(batch, count, heads, size).transpose(1, 2)


def _grid(tokens: int, count: int, has_patches: bool) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Tokens before the patches, rows and columns of patches, rows and columns of agents.

    197 tokens of an image and 49 agents: 1, 14 x 14 and 7 x 7; 197 tokens of text: 0, 1 x 197 and 1 x 49.
    """
    side, across = math.isqrt(tokens), math.isqrt(count)
    if has_patches and across * across == count and tokens - side * side <= APART:
        return tokens - side * side, (side, side), (across, across)
    return 0, (1, tokens), (1, count)


def pools(real: Tensor, count: int) -> Tensor:
    """The weight of each token in each agent: real tokens [B, T] -> [B, count, T].  Rows without any have none.

    Real, real, padding, real and 2 agents: [1/2, 1/2, 0, 0] and [0, 1/2, 0, 1/2].
    """
    place, length = real.long().cumsum(1) - 1, real.long().sum(1, keepdim=True)
    agent = torch.arange(count, device=real.device)[None]
    first, last = agent * length // count, -(-(agent + 1) * length // count)
    inside = (place[:, None] >= first[..., None]) & (place[:, None] < last[..., None]) & real[:, None]
    return inside / inside.sum(-1, keepdim=True).clamp_min(1)


def agent_attention(module: nn.Module, count: int) -> None:
    """Have an attention module of transformers attend through agents, in place; its weights stay.

    Raises ValueError where it has a mask of its own, or does not go through the attention interface.
    """
    if reason := unfit(module):
        raise ValueError(reason)
    found: Any = attending(module)
    found.agents, found.has_patches = count, hasattr(found.config, "patch_size")
    found.config = copy.copy(found.config)
    found.config._attn_implementation_internal = ATTENTION


def attending(module: nn.Module) -> nn.Module | None:
    """The module, or the one within, that goes through transformers' attention interface; None where none does."""
    names = (inspect.unwrap(type(m).forward).__code__.co_names for m in module.modules())
    found = [m for m, used in zip(module.modules(), names, strict=True) if "ALL_ATTENTION_FUNCTIONS" in used]
    return found[0] if len(found) == 1 else None


def unfit(module: nn.Module) -> str:
    """Why a module cannot attend through agents; empty where nothing but a forward pass would tell."""
    found: Any = attending(module)
    if found is None or not hasattr(found, "config"):
        name = type(module).__name__
        return f"{name} does not compute attention through transformers' attention interface, so it takes no agents"
    name = type(found).__name__
    if getattr(found, "is_causal", True):
        return f"{name} is causal, and agents are averages of all tokens, later ones too"
    if getattr(found, "sliding_window", None) or "sliding" in str(getattr(found, "layer_type", "")):
        return f"{name} sees a sliding window, and agents are averages of all tokens"
    if bias := next((n for n, _ in [*found.named_parameters(), *found.named_modules()] if BIAS.search(n)), ""):
        return f"{name} adds `{bias}` to its scores, which does not go through agents"
    return ""


AttentionInterface.register(ATTENTION, through_agents)
