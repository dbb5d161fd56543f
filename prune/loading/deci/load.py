"""Read a deci checkpoint back as the pruned transformers model that it is: the proof of what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from dropformer.prune.errors import CheckpointError
from dropformer.prune.files import open_checkpoint
from dropformer.prune.files.config_json import read_config
from dropformer.prune.loading.deci.families import FAMILIES
from dropformer.prune.loading.described import check_whole, config_from
from dropformer.prune.loading.modeling import MODEL_TYPE, base_config_class, pruned_config_class
from dropformer.prune.loading.quiet import quiet_transformers

ATTENTION = {"self_attn": ["zeros", None], "input_layernorm": "input"}
MLP = {"mlp": "zeros", "post_attention_layernorm": "input"}


def dropformer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the format `dropformer` that says what a deci checkpoint's config.json says.

    Raises CheckpointError for a DeciLM that dropformer did not write.
    """
    base = fields.get("base_model_type")
    if base not in FAMILIES:
        raise CheckpointError(f"this DeciLM does not name a base_model_type among {', '.join(FAMILIES)}; not ours")
    ours = ("block_configs", "auto_map", "rope_theta", "rope_scaling", "torch_dtype")
    new = {key: value for key, value in fields.items() if key not in ours}
    if base == "mistral":
        new["sliding_window"] = fields.get("sliding_window")
        new.pop("layer_types", None)
    if base == "qwen2" and "sliding_window" in fields:
        new["use_sliding_window"] = True
    skips = {i: _skipped(block) for i, block in enumerate(fields["block_configs"])}
    new |= {"model_type": MODEL_TYPE, "architectures": [f"Dropformer{FAMILIES[base]}"]}
    new["dropformer_modules"] = {
        f"model.layers.{i}.{module}": form
        for i, names in skips.items()
        for name in names
        for module, form in (ATTENTION if name == "attention" else MLP).items()
    }
    new["dropformer_no_cache"] = [i for i, names in skips.items() if "attention" in names]
    new["per_layer_config"] = {str(i): {"skip": names} for i, names in skips.items() if names}
    return new


def load_deci(
    folder: Path, dtype: torch.dtype | str = torch.float32, place: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The model in a deci checkpoint, from its files alone, placed as `from_pretrained` is told to.

    Raises CheckpointError where they are not whole, or where the bias that Qwen 2 does not have is not zero.
    """
    fields = read_config(folder)
    config = config_from(dropformer_config(fields))
    pruned_config_class(base_config_class(config))
    native: Any = modeling_auto.AutoModelForCausalLM._model_mapping[type(config)]
    with quiet_transformers():
        model, info = native.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, **(place or {})
        )
    if fields["base_model_type"] == "qwen2":
        info = info | {"unexpected_keys": _not_zero(folder, info["unexpected_keys"])}
    check_whole(folder, info)
    return model


def _skipped(block: Mapping[str, Any]) -> list[str]:
    return [name for name, part in (("attention", "attention"), ("mlp", "ffn")) if block[part]["no_op"]]


def _not_zero(folder: Path, names: Any) -> list[str]:
    """Those of some tensors that are more than a zero bias of an output projection."""
    checkpoint = open_checkpoint(folder)
    return [name for name in names if not name.endswith(".self_attn.o_proj.bias") or any(checkpoint.read(name))]
