"""Repaired parameters as safetensors holds them: of the checkpoint's own type, as bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dropformer.prune.errors import CheckpointError
from dropformer.prune.files import NewTensor, open_checkpoint

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating-point type that most of a checkpoint's bytes have.  Raises CheckpointError where it has none."""
    sizes: dict[str, int] = {}
    for span in open_checkpoint(folder).tensors.values():
        sizes[span.dtype] = sizes.get(span.dtype, 0) + span.nbytes
    known = {name: size for name, size in sizes.items() if name in DTYPES}
    if not known or max(sizes, key=sizes.__getitem__) not in known:
        raise CheckpointError(
            f"{folder} holds quantized weights, which repairs cannot change; repair the original, then quantize"
        )
    return DTYPES[max(known, key=known.__getitem__)]


def new_tensor(tensor: Tensor) -> NewTensor:
    """A tensor's bytes as safetensors holds them."""
    dtype = next(name for name, known in DTYPES.items() if known == tensor.dtype)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return NewTensor(dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy())


def split_parameter(
    model: PreTrainedModel, parameter: str, value: Tensor, tensors: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Tensor name in the files -> its part of a parameter that transformers merges from them as it loads.

    `model`: of the dense class, on the meta device; `tensors`: their shapes in the files.  Raises CheckpointError
    where transformers does not split it into just these.
    Example: experts.gate_up_proj [E, 2 F, D] -> experts.0.w1.weight [F, D], experts.0.w3.weight [F, D], ...
    """
    made = cast(dict[str, Tensor], revert_weight_conversion(model, {parameter: value}))
    found = {}
    for name, shape in tensors.items():
        same = [part for other, part in made.items() if f".{name}".endswith(f".{other}") or other.endswith(f".{name}")]
        if len(same) != 1 or tuple(same[0].shape) != tuple(shape):
            raise CheckpointError(
                f"{parameter} was repaired, and transformers does not split it into what the files hold ({name}); "
                "leave out --repair distill"
            )
        found[name] = same[0]
    return found
