"""Tiny GGUF files of many architectures, from random models of transformers: names by the gguf package's own table.

What llama.cpp's converter does to a family's tensors is done here on its own: Gemma's and Nemotron's norms hold what
transformers adds 1 to, GPT-2's matrices are turned, fused queries, keys and values are sorted, experts are split.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tiny_gguf import tiny_fields, write_vocabulary
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ARCHITECTURES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe"}  # else as transformers says
NORMS_PLUS_ONE = ("gemma2", "gemma3_text", "nemotron")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 16, **EXPERTS, "norm_topk_prob": True},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48},
    "phi3": {"sliding_window": None, "pad_token_id": 2},
    "gpt2": {"n_ctx": 64, "n_positions": 64, "n_inner": 96, "num_key_value_heads": 4},
    "bloom": {"num_key_value_heads": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "ffn_hidden_size": 256},
    "nemotron": {"partial_rotary_factor": 0.5},
    "stablelm": {"partial_rotary_factor": 0.5, "qk_layernorm": False, "use_parallel_residual": False},
    "starcoder2": {"sliding_window": None},
}


def tiny_model(family: str, blocks: int) -> PreTrainedModel:
    """A random model of a family, the same every time; norms and biases are random too."""
    torch.manual_seed(0)
    fields = {**tiny_fields(blocks), **CHANGES.get(family, {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.float().eval()


def family_gguf(path: Path, model: PreTrainedModel, more: Callable[[gguf.GGUFWriter], None] | None = None) -> Path:
    """`model` as a GGUF file in float32; `more` adds keys."""
    config = model.config
    name = ARCHITECTURES.get(config.model_type, config.model_type)
    architecture = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    writer = gguf.GGUFWriter(path, name)
    describe(writer, config)
    if more:
        more(writer)
    write_vocabulary(writer, "gpt-2")
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for given, value in tensors(model):
        new = names.get_name(
            given.removeprefix("transformer.") if name == "bloom" else given, try_suffixes=(".weight", ".bias")
        )
        assert new, f"{name} has no name for {given}"
        writer.add_tensor(new, np.ascontiguousarray(value.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def describe(writer: gguf.GGUFWriter, config: Any) -> None:
    """The keys that tell the model's shape."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    inner = (
        next(
            value
            for key in ("n_inner", "ffn_hidden_size", "intermediate_size")
            if (value := getattr(config, key, None))
        )
        if config.model_type != "bloom"
        else 4 * config.hidden_size
    )
    writer.add_context_length(getattr(config, "max_position_embeddings", None) or 128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    epsilons = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    epsilon = next(value for key in epsilons if (value := getattr(config, key, None)))
    (writer.add_layer_norm_rms_eps if hasattr(config, "rms_norm_eps") else writer.add_layer_norm_eps)(epsilon)
    rotary = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rotary:
        writer.add_rope_freq_base(rotary["rope_theta"])
        writer.add_rope_dimension_count(int(width * rotary.get("partial_rotary_factor", 1)))
    elif "full_attention" in rotary:
        writer.add_rope_freq_base(rotary["full_attention"]["rope_theta"])
    if experts := getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)
    if config.model_type == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's parameters as llama.cpp wants them, under transformers' names."""
    config = model.config
    for name, value in model.named_parameters():
        if config.model_type in NORMS_PLUS_ONE and name.endswith("norm.weight"):
            value = value + 1
        if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.T
        if name.endswith("shared_expert_gate.weight"):
            value = value[0]
        if name.endswith((".query_key_value.weight", ".query_key_value.bias")):
            value = _sorted(value, config)
        if name.endswith(".experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for part, half in zip(("gate_proj", "up_proj"), value.chunk(2, dim=1), strict=True):
                yield f"{stem}{part}.weight", half
        else:
            yield (
                name.removesuffix("down_proj") + "down_proj.weight" if name.endswith("experts.down_proj") else name,
                value,
            )


def _sorted(value: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of fused queries, keys and values, of each group together, as all queries, all keys, all values."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_kv_heads", None) or heads
    rows = value.reshape(groups, heads // groups + 2, config.hidden_size // heads, *value.shape[1:])
    parts = (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])
    return torch.cat([part.reshape(-1, *value.shape[1:]) for part in parts])
