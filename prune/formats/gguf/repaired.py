"""Repaired parameters of a pruned model as tensors of its GGUF file: names, types, and the order of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from dropformer.prune.errors import CheckpointError
from dropformer.prune.formats.gguf.keys import interleaved
from dropformer.prune.formats.gguf.layout import ROTATED, Dense, GgufBlock, NewValues, is_stock

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16
DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LEAVES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MAP = {"self_attn.weight": "attn_output.weight", "self_attn.bias": "ffn_down.bias"}
"""Where a linear map's matrix and bias go in the block that it has for itself."""


def new_values(
    tensors: Mapping[str, Tensor], dense: Dense, blocks: Sequence[GgufBlock], path: str
) -> dict[str, NewValues]:
    """Repaired parameters by the new file's tensor names; `path` is the stack's in the model.

    A matrix keeps the type that the dense file has for it; F16 replaces a quantized one, or F32 where its
    values need the range.  Vectors are F32, as llama.cpp wants them.  Raises CheckpointError for a parameter
    that the file holds under no one name.
    """
    found = {}
    for parameter, tensor in tensors.items():
        name, block = _name(parameter, blocks, path)
        old = _old_name(name, block)
        like = dense.header.tensors.get(old)
        if like is None and not (block and block.mapped):
            raise CheckpointError(f"{parameter} was repaired, but {dense.name} has no {old}; leave out --repair")
        values = _stored(tensor, like.kind if like else F32)
        if block and name.partition(".")[2].partition(".")[2] in ROTATED and _rotates(dense, blocks):
            heads = dense.heads if "attn_q" in name else dense.kv_heads
            values = NewValues(values.kind, values.shape, memoryview(interleaved(values.data, heads, dense.head_width)))
        found[name] = values
    return found


def _rotates(dense: Dense, blocks: Sequence[GgufBlock]) -> bool:
    """Does the new file hold the rows of queries and keys in another order than the model in memory?"""
    return dense.architecture == "llama" or not is_stock(blocks)


def _name(parameter: str, blocks: Sequence[GgufBlock], path: str) -> tuple[str, GgufBlock | None]:
    """The new file's name for a parameter of the pruned model, and the block that it is in."""
    if parameter in OUTSIDE:
        return OUTSIDE[parameter], None
    place, _, rest = parameter.removeprefix(f"{path}.").partition(".")
    module, _, end = rest.rpartition(".")
    for index, block in enumerate(blocks):
        if str(block.place) == place:
            if block.mapped and rest in MAP:
                return f"blk.{index}.{MAP[rest]}", block
            leaf = LEAVES.get(module, "")
            here = block.attention or block.mapped if leaf.startswith("attn_") else block.mlp is not None
            if leaf and here:
                return f"blk.{index}.{leaf}.{end}", block
    raise CheckpointError(f"{parameter} was repaired, but a GGUF has no place for it; leave out --repair")


def _old_name(name: str, block: GgufBlock | None) -> str:
    """The dense file's name for a tensor of the new one."""
    if block is None:
        return name
    leaf = name.split(".", 2)[2]
    return f"blk.{block.source if leaf.startswith('attn_') else block.mlp}.{leaf}"


def _stored(tensor: Tensor, like: GGMLQuantizationType) -> NewValues:
    kind = F32 if tensor.ndim < 2 else like if like in DTYPES else F16
    values = tensor.detach().cpu().to(DTYPES[kind])
    if kind is F16 and not torch.isfinite(values).all():
        kind, values = F32, tensor.detach().cpu().float()
    data = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    return NewValues(kind, tuple(reversed(tensor.shape)), data.data)
