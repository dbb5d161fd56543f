"""Weights read from a checkpoint's files module by module, into a model that has none.

A tensor is read in pieces, moved to the device where there is one and cast on the way, so that no more than the
module and one piece is in memory.  What a module leaves behind is filled again for the next of its shape: memory
does not grow with the number of modules.
"""

from __future__ import annotations

import mmap
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from dropformer.prune.errors import CheckpointError
from dropformer.prune.files import Checkpoint, TensorSpan
from dropformer.prune.loading.described import renamed_on_load
from dropformer.prune.loading.quiet import quiet_transformers

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool},
}
PIECE = 8 << 20  # bytes read at once


class Weights:
    """Fills and empties the modules of a model whose parameters are on the meta device.

    `bytes_read` counts what came from the files.  Raises CheckpointError where the files lack a tensor.
    """

    def __init__(
        self, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device = torch.device("cpu")
    ) -> None:
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self.bytes_read = 0
        self._plain, self._converted = _sources(model, checkpoint)
        self._tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._mapping = get_model_conversion_mapping(model)
        self._spare: dict[tuple, list[Tensor]] = defaultdict(list)
        self._rows: dict[str, Tensor] = {}  # embeddings read row by row, and which rows are there
        self._piece = torch.empty(PIECE, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def nbytes(self, path: str, loaded: bool = False) -> int:
        """Bytes of the parameters below a module: of those still to be loaded, or of those that are."""
        module = self.model.get_submodule(path)
        return sum(t.numel() * t.element_size() for *_, t in _parameters(module, path, empty=not loaded))

    def load(self, path: str, recurse: bool = True) -> None:
        """Read the parameters and the saved buffers of a module, and of those below it."""
        module = self.model.get_submodule(path)
        self._convert(path, recurse)
        for owner, name, full, empty in list(_parameters(module, path, recurse)):
            source = self._plain.get(full) or self._plain.get(self._tied.get(full, ""))
            if source is None:
                raise CheckpointError(
                    f"{self.checkpoint.folder} has no tensor for {full}; get a complete copy of the checkpoint"
                )
            owner._parameters[name] = nn.Parameter(self._read(source, empty), requires_grad=False)
        for full, buffer in _saved_buffers(module, path, recurse):
            if full in self._plain:
                buffer.copy_(self._read(self._plain[full], buffer))
        self._spare.clear()  # of shapes that this module does not have

    def load_rows(self, path: str, rows: Tensor) -> None:
        """Read some rows of an embedding whose other rows stay unread and take no memory.  rows: int64, any shape."""
        module = self.model.get_submodule(path)
        if module.get_parameter("weight").is_meta:
            module._parameters["weight"] = nn.Parameter(_untouched(module.get_parameter("weight")), requires_grad=False)
            self._rows[path] = torch.zeros(len(module.get_parameter("weight")), dtype=torch.bool)
        span = self.checkpoint.tensors[self._plain[f"{path}.weight"]]
        wanted = rows.unique().cpu()
        width = span.nbytes // span.shape[0]
        with self.checkpoint.shards[span.shard].opened() as file:
            for row in wanted[~self._rows[path][wanted]].tolist():
                data = bytearray(os.pread(file, width, span.start + row * width))
                module.get_parameter("weight").data[row] = torch.frombuffer(data, dtype=_dtype(span))
                self.bytes_read += width
        self._rows[path][wanted] = True

    def has_rows(self, path: str) -> bool:
        """Can an embedding be read row by row?  Not on a GPU, nor where it is made from other tensors."""
        return self.device.type == "cpu" and f"{path}.weight" in self._plain

    def release(self, path: str, recurse: bool = True) -> None:
        """Empty a module again."""
        for owner, name, _, full in list(_parameters(self.model.get_submodule(path), path, recurse, empty=False)):
            if self._rows.pop(path, None) is None:
                self._spare[(full.shape, full.dtype)].append(full.data)
            owner._parameters[name] = nn.Parameter(torch.empty_like(full, device="meta"), requires_grad=False)

    def _read(self, name: str, empty: Tensor) -> Tensor:
        span = self.checkpoint.tensors[name]
        if span.shape != tuple(empty.shape):
            raise CheckpointError(f"tensor {name} has shape {list(span.shape)}, the model wants {list(empty.shape)}")
        spare = self._spare.get((empty.shape, empty.dtype))
        target = spare.pop() if spare else torch.empty(empty.shape, dtype=empty.dtype, device=self.device)
        flat, at = target.view(-1), 0
        for values in self._pieces(span):
            flat[at : at + len(values)] = values.to(self.device)  # in the file's type, cast there
            at += len(values)
        return target

    def _pieces(self, span: TensorSpan) -> Iterator[Tensor]:
        view, dtype = self._piece.numpy().data, _dtype(span)
        with self.checkpoint.shards[span.shard].opened() as file:
            for start in range(span.start, span.end, PIECE):
                size = min(PIECE, span.end - start)
                if os.preadv(file, [view[:size]], start) != size:
                    raise CheckpointError(f"{span.shard} ended early; get a complete copy of the checkpoint")
                self.bytes_read += size
                yield self._piece[:size].view(dtype)

    def _convert(self, path: str, recurse: bool) -> None:
        """Load tensors that the model holds in another form, merged experts for example, as transformers does."""
        names = [n for full, made_of in self._converted.items() if recurse and _below(full, path) for n in made_of]
        if not names:
            return
        self._spare.clear()
        tensors = {name: torch.cat([p.clone() for p in self._pieces(self.checkpoint.tensors[name])]) for name in names}
        tensors = {name: t.view(self.checkpoint.tensors[name].shape) for name, t in tensors.items()}
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        with quiet_transformers():
            place = {"": str(self.device)}
            how = LoadStateDictConfig(weight_mapping=cast(Any, self._mapping), dtype=dtype, device_map=place)
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, how)
        if info.conversion_errors or info.mismatched_keys or info.unexpected_keys:
            raise CheckpointError(f"{names[0]} and its like cannot be converted for {type(self.model).__name__}")


def _sources(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Parameter -> the one tensor that is it; parameter -> the tensors that it, and maybe others, is made of."""
    rename, state = renamed_on_load(model), model.state_dict()
    plain: dict[str, str] = {}
    converted: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.tensors:
        full, pattern = rename(name)
        if full not in state and name in state:
            full, pattern = name, None
        if pattern is None:
            plain[full] = name
        else:
            converted[full].append(name)
    return plain, dict(converted)


def _parameters(
    module: nn.Module, path: str, recurse: bool = True, empty: bool = True
) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """(owner, name, full name, parameter) below the module at `path`: those that are empty, or those that are not."""
    for inner, owner in module.named_modules() if recurse else [("", module)]:
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta == empty:
                yield owner, name, ".".join(part for part in (path, inner, name) if part), parameter


def _saved_buffers(module: nn.Module, path: str, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    for inner, owner in module.named_modules() if recurse else [("", module)]:
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield ".".join(part for part in (path, inner, name) if part), buffer


def _below(name: str, path: str) -> bool:
    return not path or name.startswith(path + ".")


def _dtype(span: TensorSpan) -> torch.dtype:
    if span.dtype not in DTYPES:
        raise CheckpointError(
            f"{span.shard} holds {span.dtype} tensors, which cannot be streamed; load the model whole"
        )
    return DTYPES[span.dtype]


def _untouched(like: Tensor) -> Tensor:
    """A tensor of zeros of which only the pages that are written take memory."""
    region = mmap.mmap(-1, like.numel() * like.element_size())
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        region.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(region, dtype=like.dtype).view(like.shape)
