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

from dropformer.prune.errors import CheckpointError, shown

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type, its shape with the fastest dimension first, and its bytes' offset in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return byte_size(self.kind, self.shape)


def byte_size(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor.  Raises ValueError where a row is no whole number of the type's blocks."""
    block, nbytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[0] % block:
        raise ValueError(f"rows of {shape[0] if shape else 0} values in {kind.name}, whose blocks have {block}")
    return prod(shape) // block * nbytes


@dataclass(frozen=True)
class GgufHeader:
    """metadata: key -> value, for an array its length; pairs: key -> the file's bytes from its type on, [start, end);
    arrays: the keys of arrays.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    pairs: dict[str, tuple[int, int]]
    arrays: frozenset[str] = frozenset()

    def text(self, key: str) -> str | None:
        """The string under `key`, if there is one."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    @property
    def alignment(self) -> int:
        return self.metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)


def read_gguf_header(path: Path, name: str | None = None) -> GgufHeader:
    """The header of the GGUF file at `path`, which messages call `name`.

    Raises CheckpointError if it is no GGUF file, damaged, or shorter than its tensors.
    """
    name = name or path.name
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Reader(view, name).header()
    except (struct.error, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{name} is damaged: its GGUF header makes no sense ({error})") from error
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
        metadata: dict[str, Any] = {}
        pairs, arrays = {}, set()
        for _ in range(pair_count):
            key, start = self.new_name(metadata), self.at
            kind = self.number("<I")
            metadata[key] = self.value(kind)
            pairs[key] = (start, self.at)
            if kind == ARRAY:
                arrays.add(key)
        return GgufHeader(metadata, self.tensors(tensor_count, metadata), pairs, frozenset(arrays))

    def tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, GgufTensor]:
        found: dict[str, GgufTensor] = {}
        for _ in range(count):
            name, dimensions = self.new_name(found), self.number("<I")
            if not 0 < dimensions <= MAX_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            shape = tuple(self.number("<Q") for _ in range(dimensions))
            kind, offset = GGMLQuantizationType(self.number("<I")), self.number("<Q")
            found[name] = GgufTensor(kind, shape, offset)
        alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {alignment}")
        base = -(-self.at // alignment) * alignment
        need = base + max((tensor.start + tensor.nbytes for tensor in found.values()), default=0)
        if need > len(self.view):
            raise CheckpointError(
                f"{self.name} is cut short: its tensors need {need} bytes and it has {len(self.view)}; get it again"
            )
        return {name: GgufTensor(t.kind, t.shape, base + t.start) for name, t in found.items()}

    def new_name(self, known: dict[str, Any]) -> str:
        name = self.string()
        if name in known:
            raise ValueError(f"{shown(name)} occurs twice")
        return name

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
