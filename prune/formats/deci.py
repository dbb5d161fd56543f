"""The export format `deci`: the pruned model as DeciLMForCausalLM, for vLLM, SGLang and TensorRT-LLM.

Nemotron's architecture is Llama's with one entry per block that says what the block lacks:

    "block_configs": [{"attention": {"no_op": false, "n_heads_in_group": 3, "replace_with_linear": false},
                       "ffn": {"no_op": true, "ffn_mult": null, "replace_with_linear": false}}, ...]

Tensors have the names of Llama; a dropped branch has no norm either.  What the architecture cannot
carry is refused here, with the reason, rather than by an engine or by nobody.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dropformer.prune.block_map import MappedBlock, Surgery, new_name
from dropformer.prune.errors import ArchitectureError, PlanError
from dropformer.prune.files import CopyReport
from dropformer.prune.files.layout import NewTensor
from dropformer.prune.formats.writing import ExportJob, replacements, write_pruned
from dropformer.prune.loading.deci import configuration_decilm
from dropformer.prune.loading.deci.families import check_family
from dropformer.prune.loading.described import config_from
from dropformer.prune.surgery.stored_tensors import new_tensor, stored_dtype

ARCHITECTURE = "DeciLMForCausalLM"
CODE_FILE = "configuration_decilm.py"
_SHAPE = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads max_position_embeddings"
_REST = "rms_norm_eps initializer_range bos_token_id eos_token_id pad_token_id dtype"
COPIED = (*_SHAPE.split(), *_REST.split())
BOTH = {"attn", "mlp"}


def deci_config(config: Mapping[str, Any], surgery: Surgery, parameters: Collection[str] = ()) -> dict[str, Any]:
    """config.json of the deci checkpoint.

    `config` is the dense model's config.json as read, `parameters` what its files hold: transformers takes a head
    that is there for what it is, even where it should be the embedding.  Raises ArchitectureError for a model and
    PlanError for a plan that the architecture cannot carry.
    """
    check_family(config)
    blocks = _checked_blocks(surgery)
    full = config_from(copy.deepcopy(dict(config))).to_dict()
    _check_settings(full)
    heads, hidden = full["num_attention_heads"], full["hidden_size"]
    fields: dict[str, Any] = {"architectures": [ARCHITECTURE]}
    fields["model_type"] = configuration_decilm.DeciLMConfig.model_type
    fields["auto_map"] = {"AutoConfig": f"{Path(CODE_FILE).stem}.DeciLMConfig"}
    fields |= {"base_model_type": full["model_type"], "num_hidden_layers": len(blocks)}
    fields |= {key: full.get(key) for key in COPIED}
    fields["tie_word_embeddings"] = full["tie_word_embeddings"] and "lm_head.weight" not in parameters
    fields |= {"torch_dtype": full.get("dtype"), "hidden_act": "silu", "mlp_bias": full.get("mlp_bias", False)}
    fields["head_dim"] = full.get("head_dim") or hidden // heads
    fields["attention_bias"] = full["model_type"] == "qwen2" or full.get("attention_bias", False)
    fields |= _rope(full) | _window(full, blocks)
    fields["block_configs"] = [_block(full, set(block.skipped)) for block in blocks]
    return fields


def deci_renaming(surgery: Surgery, names: Mapping[str, str], prefix: str) -> Callable[[str], str | None]:
    """The name of each tensor of the source in the deci checkpoint; None for removed ones.

    `names` maps the source's tensors to parameters of the model, `prefix` is its trunk's (`model`).
    """

    def rename(tensor: str) -> str | None:
        if tensor.endswith(".rotary_emb.inv_freq"):  # in files of old Llamas: computed, not learned
            return None
        parameter = names[tensor]
        if not parameter.startswith((f"{prefix}.", "lm_head.")):
            parameter = f"{prefix}.{parameter}"
        return new_name(surgery.outline, surgery.block_map, parameter)

    return rename


def deci_tensors(fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, NewTensor]:
    """Tensors that the deci checkpoint has beyond the source's: Qwen 2 has biases in q, k and v alone, the
    architecture in all four projections or none, so the fourth is zero.  `fields` is what `deci_config` gave."""
    if fields["base_model_type"] != "qwen2":
        return {}
    zeros = new_tensor(torch.zeros(fields["hidden_size"], dtype=dtype))
    kept = [i for i, block in enumerate(fields["block_configs"]) if not block["attention"]["no_op"]]
    return {f"model.layers.{i}.self_attn.o_proj.bias": zeros for i in kept}


def deci_notes(fields: Mapping[str, Any]) -> list[str]:
    """What one engine or another cannot do with this checkpoint, a line each; vLLM can do all of it."""
    notes = []
    if any("ffn_mult" not in block["ffn"] for block in fields["block_configs"]):
        notes.append(
            f"SGLang and TensorRT-LLM refuse it: they take MLPs whose width is a multiple of 256, not "
            f"{fields['intermediate_size']}"
        )
    if fields.get("sliding_window"):
        notes.append(
            f"SGLang and TensorRT-LLM know no sliding window here: right up to {fields['sliding_window']} tokens only"
        )
    if fields["mlp_bias"]:
        notes.append("SGLang and TensorRT-LLM leave out the MLP's biases: do not use it there")
    if fields["attention_bias"]:
        notes.append("TensorRT-LLM leaves out the attention's biases: do not use it there")
    return notes


def write(writing: ExportJob, folder: Path) -> CopyReport:
    """Write the checkpoint, with the code that reads its config beside the weights; a stock one where the plan packs.

    Raises as `deci_config`.
    """
    if writing.block_map.packed:
        return write_pruned(writing, folder)
    fields = deci_config(writing.config, writing.surgery, list(writing.names.values()))
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(configuration_decilm.__file__, folder / CODE_FILE)
    rename = deci_renaming(writing.surgery, writing.names, writing.prefix)
    new = replacements(writing, rename) | deci_tensors(fields, stored_dtype(writing.source.folder))
    return replace(writing.copy(folder, rename, new), notes=tuple(deci_notes(fields)))


def _check_settings(full: Mapping[str, Any]) -> None:
    if full["hidden_act"] not in ("silu", "swish"):
        raise ArchitectureError(f"DeciLM's MLPs use silu, this model {full['hidden_act']}: leave out --format deci")


def _checked_blocks(surgery: Surgery) -> Sequence[MappedBlock]:
    """The blocks that remain.  Raises PlanError for a plan that engines cannot run."""
    if surgery.block_map.mapped:
        layers = ", ".join(map(str, sorted(surgery.block_map.mapped)))
        raise PlanError(
            f"{layers} became linear maps with a bias, which DeciLM does not have; repair another way, or leave "
            "out --format deci"
        )
    blocks = surgery.block_map.stacks[""]
    first = next((block for block in blocks if not set(block.skipped) >= BOTH), None)
    if first is None:
        raise PlanError("no layer is left to export; drop fewer layers")
    if "attn" in first.skipped:
        raise PlanError(
            f"the first block that is left has no attention (attn:{first.source}), and vLLM and SGLang cannot run "
            f"such a DeciLM; protect it with --keep {first.source}, or leave out --format deci"
        )
    return blocks


def _rope(full: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings as transformers 5 and the engines on it read them, and as transformers 4 does."""
    rope = full["rope_parameters"]
    if any(isinstance(value, dict) for value in rope.values()) or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ArchitectureError("DeciLM has one full rotary embedding for all blocks: leave out --format deci")
    fields = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return fields


def _window(full: Mapping[str, Any], blocks: Sequence[MappedBlock]) -> dict[str, Any]:
    """The sliding window and the blocks that have it, where any has."""
    window, every = full.get("sliding_window"), full["model_type"] == "mistral"
    types = ["sliding_attention"] * full["num_hidden_layers"] if every else full.get("layer_types") or []
    if not window or "sliding_attention" not in types:
        return {}
    return {"sliding_window": window, "layer_types": [types[block.source] for block in blocks]}


def _block(full: Mapping[str, Any], skipped: set[str]) -> dict[str, Any]:
    """A block's entry.  `n_heads_in_group`: query heads for each key-value head."""
    group = None if "attn" in skipped else full["num_attention_heads"] // full["num_key_value_heads"]
    attention = {"no_op": "attn" in skipped, "n_heads_in_group": group}
    width = {"ffn_mult": None} if "mlp" in skipped else _width(full["intermediate_size"], full["hidden_size"])
    ffn = {"no_op": "mlp" in skipped, **width}
    return {"attention": attention | {"replace_with_linear": False}, "ffn": ffn | {"replace_with_linear": False}}


def _width(intermediate: int, hidden: int) -> dict[str, Any]:
    """An MLP's width.  Engines derive it from `ffn_mult` where there is one, so there is none if they would err."""
    mult = 1.5 * intermediate / hidden
    known = {"ffn_mult": mult} if engine_width(mult, hidden) == intermediate else {}
    return known | {"intermediate_size": intermediate}


def engine_width(mult: float, hidden: int) -> int:
    """The MLP width that engines make of `ffn_mult`: two thirds of hidden * mult, up to a multiple of 256."""
    return -(-int(2 * mult * hidden / 3) // 256) * 256
