"""The config of a GGUF file's model, with what transformers 5.23 leaves at a default though the file says it.

A default that is not the file's either stops the loading (another width) or, for what no weight's shape shows (the
scale of Gemma's queries, the share of a head that is rotated), makes another model without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from dropformer.prune.formats.gguf.header import GgufHeader
from dropformer.prune.formats.gguf.stock import SCALED_DEPTHS

STATED = {  # field of the config -> key of the file, after the architecture
    "head_dim": "attention.key_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_positions": "context_length",
    "n_inner": "feed_forward_length",
}


def read_config(path: Path, header: GgufHeader) -> Any:
    """transformers' config for the GGUF file at `path`, its fields as the header has them."""
    config: Any = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    keys = {key.partition(".")[2]: value for key, value in header.metadata.items() if key not in header.arrays}
    own = config.to_dict()
    for field, key in STATED.items():
        if field in own and isinstance(keys.get(key), int):
            setattr(config, field, keys[key])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if hasattr(config, "query_pre_attn_scalar"):
        deep = keys["block_count"] == SCALED_DEPTHS.get(header.text("general.architecture") or "")
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if deep else width
    rotary = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rotary and keys.get("rope.dimension_count"):
        share = keys["rope.dimension_count"] / width
        if share != rotary.get("partial_rotary_factor", 1):
            rotary["partial_rotary_factor"] = share
    return config
