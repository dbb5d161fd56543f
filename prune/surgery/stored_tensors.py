"""Repaired parameters as safetensors holds them: of the checkpoint's own type, as bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

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
