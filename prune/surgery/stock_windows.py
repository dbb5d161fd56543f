"""A plan of attention windows alone as a stock model, in families whose class obeys `layer_types` and `sliding_window`.

A Llama or a Mistral without biases becomes a Ministral, whose class computes the same and reads both.  Not exact, so
written as our own type: Gemma 3 and Olmo 3 (other rotary frequencies in windowed layers), Cohere 2 and EXAONE 4 (rotary
positions in windowed layers alone), and any window with sinks, which no stock class has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dropformer.prune.block_map import BlockMap, new_index
from dropformer.prune.outline import Outline

OBEYS = ("qwen2", "qwen3", "smollm3", "ministral", "gemma2")
AS_MINISTRAL = {"llama": "Llama", "mistral": "Mistral"}
LLAMAS_OWN = ("attention_bias", "mlp_bias", "pretraining_tp")
SLIDING, FULL = "sliding_attention", "full_attention"


def stock_windows(config: Mapping[str, Any], outline: Outline, block_map: BlockMap) -> dict[str, Any] | None:
    """The config.json of a stock model that computes the same, None where none does.

    `config`: the dense one, whose counts and lists by block follow the block map already.
    """
    windows = set(block_map.windows.values())
    if len(block_map.rungs) > len(block_map.windows) or not replace(block_map, rungs={}).packed:
        return None
    if len(windows) != 1 or len(outline.stacks) != 1:
        return None
    (window,) = windows
    from dropformer.prune.loading.described import config_from  # imports transformers

    full = config_from(dict(config)).to_dict()
    types = _types(full) if config["model_type"] in (*OBEYS, *AS_MINISTRAL) else None
    if window.sinks or window.fold or types is None:
        return None
    if SLIDING in types and full["sliding_window"] != window.width:
        return None  # one width for all
    for layer in block_map.windows:
        types[new_index(block_map, layer)] = SLIDING
    fields: dict[str, Any] = {"sliding_window": window.width, "layer_types": types}
    if config["model_type"] in AS_MINISTRAL:
        return _ministral(full, config, fields)
    if "use_sliding_window" in full:
        fields["use_sliding_window"] = True
    if "max_window_layers" in full:  # engines that know nothing of layer_types; vLLM stops where it is below the count
        fields["max_window_layers"] = types.index(SLIDING)
    return {**config, **fields}


def _types(full: Mapping[str, Any]) -> list[str] | None:
    """Each block's attention type; None where they are not listed per block, or there are others than these two."""
    count = full["num_hidden_layers"]
    if full["model_type"] in AS_MINISTRAL:
        return None if full.get("sliding_window") else [FULL] * count
    types = list(full.get("layer_types") or ())
    return types if len(types) == count and set(types) <= {SLIDING, FULL} else None


def _ministral(full: Mapping[str, Any], config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any] | None:
    if any(full.get(name) for name in ("attention_bias", "mlp_bias")) or "auto_map" in config:
        return None
    family = AS_MINISTRAL[config["model_type"]]
    names = [name.replace(family, "Ministral", 1) for name in config.get("architectures") or ()]
    kept = {name: value for name, value in {**full, **config}.items() if name not in LLAMAS_OWN}
    return {**kept, **fields, "rope_parameters": full["rope_parameters"], "head_dim": full["head_dim"],
            "model_type": "ministral", "architectures": names}  # fmt: skip
