"""What a GGUF file says about itself, read without its tensors: metadata and the table of tensors.

The layout is that of the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md): magic, version,
counts, key-value pairs, tensor table, then the aligned tensor data.  All of it is checked against the
file's size, so that a truncated file is noticed before anything is loaded.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from dropformer.prune.errors import CheckpointError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufHeader:
    """metadata: key -> value, for an array its length; tensors: name -> number of elements."""

    metadata: dict[str, Any]
    tensors: dict[str, int]

    def text(self, key: str) -> str | None:
        """The string under `key`, if there is one."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of the GGUF file at `path`.

    Raises CheckpointError if it is no GGUF file, damaged, or shorter than its tensors.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Reader(view, path.name).header()
    except (struct.error, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is damaged: its GGUF header makes no sense ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """A cursor over a GGUF file."""

    def __init__(self, view: mmap.mmap, name: str) -> None:
        self.view, self.name, self.at = view, name, 0

    def header(self) -> GgufHeader:
        if self.view[:4] != b"GGUF":
            raise CheckpointError(f"{self.name} is no GGUF file: it does not begin with GGUF; get it again")
        self.at = 4
        version = self.number("<I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.name} is GGUF version {version}; expected 2 or 3, little-endian")
        tensor_count, pair_count = self.number("<Q"), self.number("<Q")
        metadata = {}
        for _ in range(pair_count):
            key = self.string()
            metadata[key] = self.value(self.number("<I"))
        return GgufHeader(metadata, self.tensors(tensor_count, metadata))

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, int]:
        sizes, end = {}, 0
        for _ in range(count):
            name = self.string()
            elements = prod(self.number("<Q") for _ in range(self.number("<I")))
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.number("<I"))]
            end = max(end, self.number("<Q") + elements // block * nbytes)
            sizes[name] = elements
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        need = -(-self.at // alignment) * alignment + end
        if need > len(self.view):
            raise CheckpointError(
                f"{self.name} is cut short: its tensors need {need} bytes and it has {len(self.view)}; get it again"
            )
        return sizes

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.view, self.at)
        self.at += struct.calcsize(form)
        return value

    def skip(self, nbytes: int) -> None:
        self.at += nbytes
        if self.at > len(self.view):
            raise CheckpointError(f"{self.name} is cut short within its header; get it again")

    def string(self) -> str:
        length = self.number("<Q")
        self.skip(length)
        return self.view[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"value type {kind}")
        kind, count = self.number("<I"), self.number("<Q")
        if kind in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[kind]))
        else:
            for _ in range(count):
                self.skip(self.number("<Q")) if kind == STRING else self.value(kind)
        return count
