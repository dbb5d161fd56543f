"""Tiny random models of any transformers family, shrunk field by field from the family's default config."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, WIDTH, HEADS, HEAD_DIM, INNER, EXPERTS, LAYERS = 128, 64, 4, 16, 96, 4, 4

# The value that a field gets, wherever a config or one of its sub-configs has it with a larger number.
_SIZES: list[tuple[int, str]] = [
    (VOCAB, "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size"),
    (WIDTH, "hidden_size d_model n_embd emb_dim embedding_dim lru_width adapter_in_dim adapter_input_size"),
    (WIDTH, "adapter_out_dim backbone_hidden_size word_embed_proj_dim out_hidden_size embedding_size embed_dim"),
    (WIDTH, "hidden_size_global"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    (HEADS, "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads index_n_heads"),
    (HEADS, "swa_num_attention_heads linear_num_value_heads linear_num_heads"),
    (2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads num_query_groups"),
    (HEAD_DIM, "head_dim global_head_dim swa_head_dim kv_channels linear_head_dim linear_key_head_dim d_head d_kv"),
    (HEAD_DIM, "linear_value_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim dim_head"),
    (8, "rotary_dim"),
    (INNER, "intermediate_size moe_intermediate_size shared_expert_intermediate_size ffn_dim d_ff dff decoder_ffn_dim"),
    (INNER, "encoder_ffn_dim ffn_hidden_size expert_ffn_hidden_size dim_ff d_inner shared_intermediate_size n_inner"),
    (INNER, "shared_experts_intermediate_size intermediate_size_mlp mlp_dim dense_intermediate_size"),
    (INNER, "moe_shared_expert_intermediate_size feed_forward_size"),
    (EXPERTS, "num_local_experts num_experts n_routed_experts moe_num_experts zero_expert_num"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k"),
    (1, "num_shared_experts n_shared_experts moe_num_shared_experts n_group n_groups num_expert_group topk_group"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank laurel_rank adapter_rank gated_norm_rank hc_lowrank"),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions"),
    (64, "original_max_position_embeddings max_source_positions context_length"),
    (8, "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size local_attention"),
    (8, "local_attention_window_len block_size mamba_d_state state_size ssm_state_size"),
    (4, "mamba_chunk_size chunk_size index_topk index_topk_blocks"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers"),
    (LAYERS, "num_decoder_layers conf_num_hidden_layers depth"),
    (8, "hidden_size_per_layer_input"),
    (32, "image_size"),
    (0, "num_nextn_predict_layers"),
]
SMALL = {name: value for value, names in _SIZES for name in names.split()}

# What the field names alone do not tell: a family's own constraints between its fields.
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"] * 2}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_SWIN = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "albert": {"num_hidden_groups": LAYERS},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 1},
    "blenderbot": {"encoder_layers": LAYERS},
    "blt": {"encoder_hash_byte_group_vocab": VOCAB, "encoder_config": {"num_hidden_layers": 2}},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "funnel": {"block_sizes": [2, 2], "d_head": HEAD_DIM, "n_head": HEADS, "d_inner": INNER},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "granitemoehybrid": {**_LINEAR_AND_FULL, "mamba_n_heads": 8, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "led": {"attention_window": [8] * LAYERS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "nemotron_h": {"layers_block_type": ["full_attention", "linear_attention", "moe", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 6, "block_types": ["attention", "recurrent"]},
    "llava": {"vision_config": {"patch_size": 8}},
    "longformer": {"attention_window": [8] * LAYERS},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {**_INDEXER, "ngram_vocab_size_base": 64},
    "qwen4_exp": {"text_config": {**_INDEXER, "ngram_vocab_size_base": 64}},
    "reformer": {
        "hash_seed": 0,  # else every forward pass hashes anew
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "attention_head_size": HEAD_DIM,
    },
    "rwkv": {"rescale_every": 0},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "xlstm": {"hidden_size": 2 * WIDTH, "embedding_dim": 2 * WIDTH},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The family's default config, shrunk; four blocks that show every kind of layer it has."""
    config_class = CONFIG_MAPPING[model_type]
    start = SPECIAL.get(model_type, {})
    try:
        default = config_class()
    except Exception:
        default = config_class(**start)
    return config_class(**_merged(_shrunk(default), _merged(start, changes)))


def _merged(fields: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        k: _merged(fields[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(fields.get(k), dict)
    }
    return {**fields, **over, **both}


def tiny_model(model_type: str, auto: type = AutoModelForCausalLM, **changes: Any) -> nn.Module:
    """A random float32 model of the family in evaluation mode, the same for every call."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **changes)
    if auto is AutoModelForCausalLM and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    try:
        model = auto.from_config(config, dtype=torch.float32)
    except AttributeError:  # some composite configs name a class that is built from their text part alone
        model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(
            config.get_text_config(decoder=True)
        )
    _randomize(model)
    return model.eval()


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Biases, norms and gates away from 0 and 1, so that forgetting one shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if (parameter.ndim == 1 and parameter.is_floating_point()) or (
            parameter.is_floating_point() and not parameter.any()
        ):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    own = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    counts = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    depth = next((own[k] for k in counts if isinstance(own.get(k), int)), 0)
    kept = _blocks_to_keep(own, depth)
    small: dict[str, Any] = {}
    for name, value in own.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _shrunk(value)
        elif isinstance(value, (list, tuple)) and depth and len(value) == depth:
            items = [value[i] for i in kept]
            small[name] = [_number(name.removesuffix("_per_layer"), v) for v in items]
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = _number(name, value)
        elif name.endswith("_token_id") and isinstance(value, list):
            small[name] = 2
        elif name == "head_dim" and value is None:
            small[name] = HEAD_DIM
    heads = own.get("num_attention_heads")
    for name in small.keys() & {"num_key_value_heads", "num_kv_heads", "linear_num_key_heads"}:
        small[name] = {heads: HEADS, 1: 1}.get(own[name], HEADS // 2)
    return {k: v for k, v in small.items() if v is not own.get(k)}


def _number(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name.endswith(("_token_id", "_token_index")):
        return value if value < VOCAB else {"pad": 0, "bos": 1, "eos": 2}.get(name.split("_")[0], 3)
    return min(value, SMALL.get(name, value))


def _blocks_to_keep(own: dict[str, Any], depth: int) -> list[int]:
    """LAYERS block indices, in order, that cover as many different kinds of block as possible."""
    lists = [v for v in own.values() if isinstance(v, (list, tuple)) and depth and len(v) == depth]
    if not lists:
        return list(range(min(depth, LAYERS)))
    kinds = [repr([v[i] for v in lists]) for i in range(depth)]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:LAYERS]
    rest = [i for i in range(depth) if i not in first][: LAYERS - len(first)]
    return sorted(first + rest)
