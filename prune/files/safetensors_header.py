"""The header of a safetensors file, read and written at byte level, without torch and without NumPy.

A file is 8 bytes (little-endian length N), N bytes of JSON, then the tensors' bytes without gaps:

    {"__metadata__": {str: str}, NAME: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}

Offsets count from the end of the header.  The rules are those of the format's description and of the
safetensors 0.8 reader; repeated names and unknown keys, which that reader accepts, are errors here.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dropformer.prune.errors import CheckpointError, OutputError, shown
from dropformer.prune.files.byteranges import PAGE
from dropformer.prune.files.strict_json import MAX_BYTES, MAX_VALUES, parse_object

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits per element of every dtype that safetensors 0.8 knows."""

_ENTRY = {"dtype", "shape", "data_offsets"}
_COUNT_LIMIT = 2**63
HEADER_BASE = 4 << 20  # most bytes of `__metadata__`
HEADER_PER_TENSOR = 1024  # most bytes of JSON per tensor; real ones take about 120


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """The byte range `[start, end)` of a tensor in the file `shard`, from the file's first byte."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A validated header: tensors in file order, and the file's metadata."""

    tensors: Mapping[str, TensorSpan]
    metadata: Mapping[str, str]


def byte_size(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; ValueError for an unknown dtype, a bad shape or a fractional number of bytes."""
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"unknown dtype {shown(dtype)!r}")
    count = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= _COUNT_LIMIT:
            raise ValueError(f"{shown(size)!r} is not a dimension")
        count *= size
        if count > _COUNT_LIMIT:
            raise ValueError("the number of elements overflows")
    size, rest = divmod(count * BITS[dtype], 8)
    if rest:
        raise ValueError(f"{count} elements of {dtype} do not fill whole bytes")
    return size


def read_header(file: int, shard: str, where: object) -> Header:
    """Read and validate the header of an open file.

    file: a file descriptor; its position does not change.  where: the path for messages.
    Raises CheckpointError unless header and tensors cover every byte of the file.
    """
    size = os.fstat(file).st_size
    prefix = os.pread(file, 8, 0)
    if prefix == b"version ":
        raise CheckpointError(f"{where}: a Git LFS pointer, not the weights; run `git lfs pull` there")
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > MAX_BYTES or length > size - 8:
        raise CheckpointError(
            f"{where}: no safetensors file, or cut short (header of {length} bytes in a file of {size}); "
            "download it again"
        )
    raw = os.pread(file, length, 8)
    tensors = raw.count(b'"data_offsets"')
    if length > HEADER_BASE + HEADER_PER_TENSOR * tensors:
        raise CheckpointError(f"{where}: a header of {length} bytes for {tensors} tensors; do not use this file")
    table = parse_object(raw, where, MAX_VALUES + 16 * tensors)
    try:
        metadata = _metadata(table.pop("__metadata__", None))
        spans = [(name, _span(name, entry, shard, 8 + length)) for name, entry in table.items()]
        return Header(_without_gaps(spans, 8 + length, size), metadata)
    except ValueError as error:
        raise CheckpointError(f"{where}: corrupt header ({error}); download the file again") from None


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], phase: int | None = None
) -> bytes:
    """The length prefix and header of a file with `tensors` (name, dtype, shape) in that order.

    Padded with spaces to a multiple of 8 bytes, as upstream; with a `phase` that is one, to that remainder modulo a
    page, so that the tensors keep their offsets in their pages (see `best_phase`).
    Raises OutputError if the header is longer than readers accept.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + byte_size(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    padding = -len(text) % 8 if phase is None or phase % 8 else (phase - 8 - len(text)) % PAGE
    text += b" " * padding
    if len(text) > MAX_BYTES:
        raise OutputError(f"the header would take {len(text)} bytes, more than readers accept ({MAX_BYTES})")
    return len(text).to_bytes(8, "little") + text


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("__metadata__ is not a map of strings")
    for text in (*value.keys(), *value.values()):
        _check_unicode(text)
    return value


def _span(name: str, entry: Any, shard: str, base: int) -> TensorSpan:
    """The tensor's byte range; ValueError unless dtype, shape and offsets agree."""
    _check_unicode(name)
    if not isinstance(entry, dict) or entry.keys() != _ENTRY or not isinstance(entry["shape"], list):
        raise ValueError(f"tensor {shown(name)!r} is not described by dtype, shape and data_offsets")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        raise ValueError(f"tensor {shown(name)!r} has bad data_offsets")
    start, end = offsets
    try:
        size = byte_size(entry["dtype"], entry["shape"])
    except ValueError as error:
        raise ValueError(f"tensor {shown(name)!r}: {error}") from None
    if start < 0 or end - start != size:
        raise ValueError(f"tensor {shown(name)!r} needs {size} bytes, its data_offsets span others")
    return TensorSpan(shard, entry["dtype"], tuple(entry["shape"]), base + start, base + end)


def _without_gaps(spans: list[tuple[str, TensorSpan]], start: int, end: int) -> dict[str, TensorSpan]:
    """The spans in file order; ValueError unless they tile [start, end) exactly."""
    spans.sort(key=lambda item: (item[1].start, item[1].end))
    for name, span in spans:
        if span.start != start:
            raise ValueError(f"tensor {shown(name)!r} leaves a hole or overlaps its neighbour")
        start = span.end
    if start != end:
        raise ValueError("the file is longer or shorter than its tensors")
    return dict(spans)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{shown(text)} is no valid Unicode") from None
