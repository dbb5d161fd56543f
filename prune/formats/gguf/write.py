"""Write a pruned GGUF file out of a dense one: the kept tensors' bytes are copied, quantized or not.

    write_gguf(Path("dense.gguf"), Path("pruned.gguf"), surgery)

What the file holds is decided in planned.py; here it is written and read back.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dropformer.progress import Tick
from dropformer.prune.errors import CheckpointError, VerificationError
from dropformer.prune.files.byteranges import copy_range, holds, read_at, same_range, write_at
from dropformer.prune.files.copying import CopyReport, counter, probes
from dropformer.prune.files.folder import cannot_write, new_file
from dropformer.prune.formats.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from dropformer.prune.formats.gguf.keys import Span, bare_string, interleaved
from dropformer.prune.formats.gguf.layout import GgufPiece
from dropformer.prune.formats.gguf.planned import PlannedFile, planned

if TYPE_CHECKING:
    from dropformer.prune.block_map import Surgery

VERSION = 3


@dataclass(frozen=True)
class GgufReport:
    """What was written: the architecture, the copy in figures, and what llama.cpp needs in a dropped layer's place."""

    architecture: str
    copied: CopyReport
    stand_ins: tuple[str, ...]


def write_gguf(
    source: Path,
    target: Path,
    surgery: Surgery,
    *,
    zeros: bool = False,
    record: str | None = None,
    progress: Tick | None = None,
    verify: Literal["sample", "all"] = "sample",
) -> GgufReport:
    """Write the new file `target`: the dense GGUF `source` without what `surgery` takes out, repairs put in.

    zeros: dropped layers stay, as zeros.  record: JSON for the key `dropformer.record`.  verify: "sample" compares
    beginning, end and a random window of every tensor with the source, "all" every byte.
    Raises CheckpointError for a source that is damaged or of a kind that has no pruned form in GGUF, PlanError
    where it is not the model that was cut, OutputError if `target` exists or cannot be written,
    VerificationError if the copy differs; nothing is left behind then.
    """
    if verify not in ("sample", "all"):
        raise ValueError(f"verify is {verify!r}, expected 'sample' or 'all'")
    dense = read_gguf_header(source)
    plan = planned(dense, source.name, surgery, zeros, record)
    pieces = plan.pieces
    with new_file(target) as file, _opened(source, file) as (old, new):
        header = _header(old, plan, dense.alignment)
        write_at(new, memoryview(header), 0)
        *starts, end = _starts(pieces, dense.alignment, len(header))
        _write_tensors(old, new, pieces, starts, progress)
        os.ftruncate(new, end)
        _check_header(new, file, header, pieces, starts)
        _check_tensors(old, new, pieces, starts, verify == "all")
    return GgufReport(plan.architecture, _report(dense, pieces, target), plan.stand_ins)


@contextmanager
def _opened(source: Path, target: Path) -> Iterator[tuple[int, int]]:
    """Descriptors of the dense file and of the new one, in which nothing is yet."""
    try:
        with source.open("rb", buffering=0) as old, target.open("xb+", buffering=0) as new:
            yield old.fileno(), new.fileno()
    except OSError as error:
        raise cannot_write(target, error) from None


def _header(old: int, plan: PlannedFile, alignment: int) -> bytes:
    """All that comes before the tensors' data."""
    pieces, pairs = plan.pieces, plan.pairs
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(pieces), len(pairs))]
    for key, value in pairs.items():
        parts.append(bare_string(key))
        parts += [_read(old, part) for part in (value if isinstance(value, list) else [value])]
    for piece, at in zip(pieces, _starts(pieces, alignment), strict=False):
        parts += [bare_string(piece.name), struct.pack(f"<I{len(piece.shape)}Q", len(piece.shape), *piece.shape)]
        parts += [struct.pack("<IQ", piece.kind, at)]
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _read(old: int, part: bytes | Span) -> bytes:
    return part if isinstance(part, bytes) else read_at(old, part[1] - part[0], part[0])


def _starts(pieces: Sequence[GgufPiece], alignment: int, at: int = 0) -> list[int]:
    """Where each tensor's bytes start, the first at `at`, and where the last one's padding ends."""
    found = [at]
    for piece in pieces:
        found.append(found[-1] + piece.nbytes + -piece.nbytes % alignment)
    return found


def _write_tensors(
    old: int, new: int, pieces: Sequence[GgufPiece], starts: Sequence[int], progress: Tick | None
) -> None:
    moved = counter(progress, sum(piece.nbytes for piece in pieces))
    for piece, at in zip(pieces, starts, strict=True):
        if piece.source is None:
            write_at(new, _own_bytes(piece), at)
            moved(piece.nbytes)
        elif piece.heads:
            for done, head in _interleaved_heads(old, piece.source, piece.heads):
                write_at(new, memoryview(head), at + done)
                moved(len(head))
        elif not copy_range(old, new, piece.source.start, at, piece.nbytes, moved):
            raise CheckpointError("the source became shorter while it was copied; start again")


def _own_bytes(piece: GgufPiece) -> memoryview:
    return memoryview(bytes(piece.nbytes)) if piece.data is None else piece.data


def _interleaved_heads(old: int, source: GgufTensor, heads: int) -> Iterator[tuple[int, bytes]]:
    """The offset and the interleaved rows of one head after the other."""
    size = source.nbytes // heads
    for done in range(0, source.nbytes, size):
        data = read_at(old, size, source.start + done)
        if len(data) < size:
            raise CheckpointError("the source became shorter while it was copied; start again")
        yield done, interleaved(data, 1, source.shape[-1] // heads)


def _check_header(new: int, file: Path, header: bytes, pieces: Sequence[GgufPiece], starts: Sequence[int]) -> None:
    """Read the copy's header as a stranger would; VerificationError if it is not what was meant."""
    try:
        found = read_gguf_header(file, "the copy").tensors
    except CheckpointError:
        raise VerificationError("the copy's header cannot be read back; nothing is kept") from None
    table = {p.name: GgufTensor(p.kind, p.shape, start) for p, start in zip(pieces, starts, strict=True)}
    if found != table or not holds(new, 0, memoryview(header)):
        raise VerificationError("the copy's header is not the one that was written; nothing is kept")


def _check_tensors(old: int, new: int, pieces: Sequence[GgufPiece], starts: Sequence[int], thorough: bool) -> None:
    draw = random.Random(len(pieces))
    for piece, at in zip(pieces, starts, strict=True):
        spans = [(0, piece.nbytes)] if thorough else probes(piece.nbytes, draw)
        if piece.source is None:
            data = _own_bytes(piece)
            same = all(holds(new, at + first, data[first : first + length]) for first, length in spans)
        elif piece.heads:
            heads = _interleaved_heads(old, piece.source, piece.heads)
            same = all(holds(new, at + done, memoryview(head)) for done, head in heads)
        else:
            same = all(same_range(old, new, piece.source.start + first, at + first, n) for first, n in spans)
        if not same:
            raise VerificationError(f"{piece.name}: the copy differs from the source; nothing is kept")


def _report(dense: GgufHeader, pieces: Sequence[GgufPiece], target: Path) -> CopyReport:
    kept = [piece.nbytes for piece in pieces if piece.source]
    new = [piece.nbytes for piece in pieces if not piece.source]
    overwritten = [piece.replaced.nbytes for piece in pieces if piece.replaced]
    before = sum(tensor.nbytes for tensor in dense.tensors.values())
    return CopyReport(
        tensors_kept=len(kept),
        tensors_dropped=len(dense.tensors) - len(kept) - len(overwritten),
        bytes_kept=sum(kept),
        bytes_dropped=before - sum(kept) - sum(overwritten),
        tensors_replaced=len(new),
        files=(target.name,),
        bytes_overwritten=sum(overwritten),
        bytes_new=sum(new),
    )
