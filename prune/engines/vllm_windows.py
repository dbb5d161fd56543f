"""Windows of attention in vLLM's own classes: a layer's attention is made anew, with a window, before weights load."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention


def give_window(module: nn.Module, width: int, vllm_config: VllmConfig) -> None:
    """Let the attention of a layer of vLLM's model see the last `width` tokens; its cache holds no more.

    Raises ValueError for a module without exactly one attention of vLLM's, of the plain kind.
    """
    found = [(name, part) for name, part in module.named_modules() if isinstance(part, Attention)]
    if len(found) != 1 or type(found[0][1]) is not Attention:
        raise ValueError(f"{type(module).__name__} has no single attention of vLLM's, so it cannot have a window")
    (name, old), context = found[0], vllm_config.compilation_config.static_forward_context
    if old.sliding_window is not None:
        raise ValueError(f"{old.layer_name} has a sliding window already")
    del context[old.layer_name]
    impl: Any = old.impl
    new = Attention(
        old.num_heads,
        old.head_size,
        impl.scale,
        num_kv_heads=old.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=old.quant_config,
        logits_soft_cap=getattr(impl, "logits_soft_cap", None) or None,
        per_layer_sliding_window=width,
        prefix=old.layer_name,
        attn_type=old.attn_type,
    )
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)
