"""The layout of a new checkpoint, computed without reading or writing files.

lay_out(source, names, replace) -> [NewShard(pieces, ...), ...]      the content of each new file
runs(pieces)                    -> [Run(at, start, length), ...]     adjacent bytes to copy in one call
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dropformer.prune.errors import OutputError, shown
from dropformer.prune.files.byteranges import PAGE
from dropformer.prune.files.safetensors_header import BITS, TensorSpan, byte_size
from dropformer.prune.files.shards import Checkpoint, Shard


class NewTensor(NamedTuple):
    """A tensor that is not from the source: contiguous, little-endian, row-major."""

    dtype: str
    shape: tuple[int, ...]
    data: Any
    """Anything with the buffer protocol: bytes, a memoryview, a NumPy array."""


@dataclass(frozen=True)
class Piece:
    """One tensor of a new shard, from the source at `span` or from `data`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    span: TensorSpan | None = None
    data: memoryview | None = None


@dataclass(frozen=True)
class NewShard:
    """The content of one new file, and the source's shard that it comes from, if any."""

    source: Shard | None
    pieces: tuple[Piece, ...]
    unchanged: bool

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class Run:
    """Adjacent bytes to write at offset `at` of the tensor data, from the source at `start` or from `data`."""

    at: int
    length: int
    start: int = -1
    data: memoryview | None = None


def lay_out(source: Checkpoint, names: Mapping[str, str | None], replace: Mapping[str, NewTensor]) -> list[NewShard]:
    """The new shards: the source's, in order, without dropped tensors and empty shards.

    names: the new name of every tensor of the source, None if dropped.  Tensors of `replace` with other names are
    added to the last shard.
    Raises OutputError if two tensors would have the same name, or if nothing is left.
    """
    _check_names(names)
    kept: dict[str, list[Piece]] = {name: [] for name in source.shards}
    changed: set[str] = set()
    for old, span in source.tensors.items():
        new = names[old]
        if new != old or new in replace:
            changed.add(span.shard)
        if new is not None:
            kept[span.shard].append(_piece(new, replace[new]) if new in replace else _kept(new, span))
    shards = [
        NewShard(source.shards[name], _aligned(pieces), unchanged=name not in changed)
        for name, pieces in kept.items()
        if pieces
    ]
    extra = [_piece(name, replace[name]) for name in replace if name not in set(names.values())]
    if extra:
        last = shards.pop() if shards else NewShard(None, (), unchanged=False)
        shards.append(NewShard(last.source, _aligned([*last.pieces, *extra]), unchanged=False))
    if not shards:
        raise OutputError("no tensor is left to write; drop fewer layers")
    return shards


def shard_names(count: int) -> list[str]:
    """The file names of `count` shards, as transformers numbers them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def runs(pieces: Iterable[Piece]) -> list[Run]:
    """The pieces in order, joined where they are adjacent in the source."""
    found: list[Run] = []
    at = 0
    for piece in pieces:
        run = _run(piece, at)
        before = found[-1] if found else None
        if before and run.data is None and before.data is None and before.start + before.length == run.start:
            found[-1] = Run(before.at, before.length + run.length, before.start)
        elif run.length:
            found.append(run)
        at += piece.nbytes
    return found


def best_phase(found: Iterable[Run]) -> int | None:
    """The header length, modulo a page, with which most bytes keep their offset in their page."""
    votes: dict[int, int] = {}
    for run in found:
        if run.data is None:
            phase = (run.start - run.at) % PAGE
            votes[phase] = votes.get(phase, 0) + run.length
    return max(votes, key=lambda phase: votes[phase], default=None)


def _check_names(names: Mapping[str, str | None]) -> None:
    taken = {"__metadata__"}
    for old, new in names.items():
        if new in taken:
            raise OutputError(f"{shown(old)}: cannot be renamed to {shown(new)}, that name is taken")
        if new is not None:
            taken.add(new)


def _kept(name: str, span: TensorSpan) -> Piece:
    return Piece(name, span.dtype, span.shape, span.nbytes, span=span)


def _piece(name: str, tensor: NewTensor) -> Piece:
    dtype, shape, data = tensor
    view = memoryview(data)
    size = byte_size(dtype, shape)
    if view.nbytes != size:
        raise ValueError(f"{name}: {dtype} {tuple(shape)} takes {size} bytes, not {view.nbytes}")
    return Piece(name, dtype, tuple(shape), size, data=view.cast("B") if size else memoryview(b""))


def _run(piece: Piece, at: int) -> Run:
    if piece.span is None:
        return Run(at, piece.nbytes, data=piece.data)
    return Run(at, piece.nbytes, piece.span.start)


def _aligned(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The pieces in order if each starts at a multiple of its element size, else sorted by element size."""
    if all(at % max(BITS[piece.dtype] // 8, 1) == 0 for at, piece in _offsets(pieces)):
        return tuple(pieces)
    return tuple(sorted(pieces, key=lambda piece: -BITS[piece.dtype]))


def _offsets(pieces: Iterable[Piece]) -> Iterator[tuple[int, Piece]]:
    at = 0
    for piece in pieces:
        yield at, piece
        at += piece.nbytes
