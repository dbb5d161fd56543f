"""New values for tensors of a checkpoint: which file entry each repaired parameter becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dropformer.prune.arrange import new_name, skipped_modules
from dropformer.prune.errors import CheckpointError
from dropformer.prune.files import NewTensor, open_checkpoint
from dropformer.prune.surgery import Surgery

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


def replacements(
    surgery: Surgery, names: Mapping[str, str], rename: Callable[[str], str | None], prefix: str
) -> dict[str, NewTensor]:
    """What `copy_checkpoint` is to write in place of the source's tensors, by new file name.

    `names` maps the source's tensor names to parameter names, `rename` to new tensor names.  Raises
    CheckpointError where a repaired parameter is not one tensor of the files (merged experts).
    """
    left, found = dict(surgery.tensors), {}
    bare = True  # the files leave out the prefix that the model with its head puts before the trunk's names
    for tensor, parameter in names.items():
        new_file = rename(tensor)
        if new_file is None:
            continue
        for candidate in (parameter, f"{prefix}.{parameter}"):
            new = new_name(surgery.outline, surgery.arrangement, candidate)
            bare = bare and not tensor.startswith(f"{prefix}.")
            if new in left:
                found[new_file] = new_tensor(left.pop(new))
    for parameter, tensor in left.items():
        if parameter.rpartition(".")[0] not in mapped_modules(surgery):
            raise CheckpointError(
                f"{parameter} was repaired, but the files hold it in several tensors; leave out --repair"
            )
        found[parameter.removeprefix(f"{prefix}.") if bare else parameter] = new_tensor(tensor)
    return found


def mapped_modules(surgery: Surgery) -> set[str]:
    """Paths, in the pruned model, of the modules that became linear maps."""
    forms = skipped_modules(surgery.outline, surgery.arrangement)
    return {path for path, form in forms.items() if isinstance(form, dict) and "linear" in form}


def new_tensor(tensor: Tensor) -> NewTensor:
    """A tensor's bytes as safetensors holds them."""
    dtype = next(name for name, known in DTYPES.items() if known == tensor.dtype)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return NewTensor(dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy())
