"""Tiny real GGUF files: a Llama or a Qwen 2 with a byte-level vocabulary, as llama.cpp would write it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# "Ġ 1" and "1 2" are there to be wrong: a tokenizer that splits digits can never use them.
MERGES = ["Ġ Ġ", "Ġ 1", "1 2", "h e", "l l", "he ll", "Ċ Ċ", "Ġ a"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
LEAVES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
FAMILIES: dict[str, Any] = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def vocabulary() -> list[str]:
    """Special tokens, the 256 bytes, and one token for each merge."""
    return [*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]


def tiny_fields(blocks: int) -> dict[str, int]:
    """The sizes of every tiny model that becomes a GGUF file, and the tokens of its vocabulary."""
    return {
        "vocab_size": len(vocabulary()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def tiny_model(family: str = "llama", tied: bool = True, blocks: int = 2, **changes: Any) -> PreTrainedModel:
    """A random model of a family, the same every time."""
    torch.manual_seed(0)
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**{**tiny_fields(blocks), "tie_word_embeddings": tied, **changes})).eval()
    with torch.no_grad():  # norms of one, and biases of zero, would hide one that got lost
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def tiny_llama(tied: bool = True) -> PreTrainedModel:
    return tiny_model("llama", tied)


def gguf_name(name: str) -> str:
    """model.layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight"""
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, end = name.rpartition(".")
    if stem in fixed:
        return f"{fixed[stem]}.{end}"
    _, _, block, leaf = stem.split(".", 3)
    return f"blk.{block}.{LEAVES[leaf]}.{end}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that llama.cpp's rotary embedding wants.  weight: [heads * D, ...]"""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file for `model`, in float32."""
    config, found = model.config, {}
    rotates = config.model_type == "llama"
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if rotates and "q_proj" in name:
            value = interleaved(value, config.num_attention_heads)
        if rotates and "k_proj" in name:
            value = interleaved(value, config.num_key_value_heads)
        found[gguf_name(name)] = value
    return found


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre: str | None = "smollm",
    edit: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    describe: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """`model` as a GGUF file, its matrices stored as `kind`.

    `edit` changes the tensors and `describe` the keys before they are written.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    write_vocabulary(writer, pre)
    describe(writer)
    tensors = tensors_of(model)
    edit(tensors)
    for name, value in tensors.items():
        stored = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_vocabulary(writer: gguf.GGUFWriter, pre: str | None) -> None:
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
