"""Copy a checkpoint without the dropped tensors, as byte ranges, without decoding tensors.

    copy_checkpoint(open_checkpoint(folder), target, rename)      # rename: old name -> new name, or None

Adjacent tensors are copied in one call, and the copy is compared with the source before it is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dropformer.progress import Tick
from dropformer.prune.errors import CheckpointError, OutputError, VerificationError, shown
from dropformer.prune.files.byteranges import copy_range, holds, same_range, write_at
from dropformer.prune.files.folder import cannot_write
from dropformer.prune.files.layout import NewShard, NewTensor, Piece, Run, best_phase, lay_out, runs, shard_names
from dropformer.prune.files.safetensors_header import encode_header, read_header
from dropformer.prune.files.shards import INDEX, Checkpoint, Shard

Rename = Callable[[str], str | None]
"""The new name of a tensor, or None to drop it."""

_WINDOW = 4096
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class CopyReport:
    """Counts and bytes of a copy, without headers; `notes` are lines to show to the user."""

    tensors_kept: int
    tensors_dropped: int
    bytes_kept: int
    bytes_dropped: int
    tensors_replaced: int = 0
    linked: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    bytes_overwritten: int = 0
    bytes_new: int = 0
    notes: tuple[str, ...] = ()

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors of the source."""
        return self.bytes_kept + self.bytes_dropped + self.bytes_overwritten

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors of the copy."""
        return self.bytes_kept + self.bytes_new

    def noted(self, note: str | None) -> CopyReport:
        """The report with one more note, unless it is None."""
        return dataclasses.replace(self, notes=(*self.notes, note)) if note else self


@dataclass(frozen=True)
class _Options:
    link: bool
    thorough: bool
    moved: Callable[[int], None]


def copy_checkpoint(
    source: Checkpoint,
    target: Path | str,
    rename: Rename,
    *,
    replace: Mapping[str, NewTensor] | None = None,
    link: bool = False,
    verify: Literal["sample", "all"] = "sample",
    progress: Tick | None = None,
) -> CopyReport:
    """Write the source's kept tensors, in its shards' order, as a new checkpoint in the folder `target`.

    replace: tensors by NEW name that replace the source's or are added.
    link: unchanged shards become hard links where the file system can (both checkpoints then share the file: an
    in-place edit changes both).
    verify: "sample" compares beginning, end and a random window of every tensor with the source, "all" every byte.
    Raises OutputError if the target cannot be written or already has weights, CheckpointError if the source changes
    meanwhile, VerificationError if the copy differs; the files written are then removed.
    """
    if verify not in ("sample", "all"):
        raise ValueError(f"verify is {verify!r}, expected 'sample' or 'all'")
    replace = replace or {}
    renamed = {name: rename(name) for name in source.tensors}
    shards = lay_out(source, renamed, replace)
    files = dict(zip(shard_names(len(shards)), shards, strict=True))
    options = _Options(link, verify == "all", counter(progress, sum(shard.nbytes for shard in shards)))
    with _all_or_none(Path(target)) as written:
        linked = tuple(name for name, shard in files.items() if _place(written, name, shard, options))
        if len(files) > 1:
            _write_index(written, source, files)
    return _report(source, renamed, replace, linked, tuple(path.name for path in written.paths))


class _Written:
    """The files that this copy created in its folder; existing files are never opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    @contextmanager
    def create(self, name: str) -> Iterator[int]:
        file = os.open(self.folder / name, _NEW_FILE, 0o666)
        self.paths.append(self.folder / name)
        try:
            yield file
        finally:
            os.close(file)

    def link(self, shard: Shard, name: str) -> bool:
        """Hard-link the shard's file as `name`; False if the file system does not allow it."""
        with shard.opened():
            pass
        try:
            os.link(shard.path, self.folder / name)
        except FileExistsError:
            raise
        except OSError:
            return False
        self.paths.append(self.folder / name)
        return True


@contextmanager
def _all_or_none(folder: Path) -> Iterator[_Written]:
    written = _Written(folder)
    made = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        _check_no_weights(folder)
        yield written
    except BaseException as error:
        for path in written.paths:
            path.unlink(missing_ok=True)
        if made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise cannot_write(folder, error) from None
        raise


def _check_no_weights(folder: Path) -> None:
    """Raises OutputError if the folder has weights: two checkpoints in one folder would be read as one."""
    for path in folder.iterdir():
        if path.name == INDEX or path.suffix == ".safetensors":
            raise OutputError(f"{shown(path, 1000)}: there is a checkpoint already; name another folder")


def _place(written: _Written, name: str, shard: NewShard, options: _Options) -> bool:
    """Link or copy one shard; True if linked."""
    if options.link and shard.unchanged and shard.source and written.link(shard.source, name):
        options.moved(shard.nbytes)
        return True
    with written.create(name) as target:
        if shard.source is None:
            _write_shard(-1, target, shard, options)
        else:
            with shard.source.opened() as source:
                _write_shard(source, target, shard, options)
    return False


def _write_shard(source: int, target: int, shard: NewShard, options: _Options) -> None:
    found = runs(shard.pieces)
    metadata = shard.source.metadata if shard.source else {"format": "pt"}
    tensors = ((piece.name, piece.dtype, piece.shape) for piece in shard.pieces)
    header = encode_header(tensors, metadata, best_phase(found))
    write_at(target, memoryview(header), 0)
    for run in found:
        _write_run(source, target, run, len(header), options.moved)
    _verify(source, target, shard, options.thorough)


def _write_run(source: int, target: int, run: Run, base: int, moved: Callable[[int], None]) -> None:
    if run.data is not None:
        write_at(target, run.data, base + run.at)
        moved(run.length)
    elif not copy_range(source, target, run.start, base + run.at, run.length, moved):
        raise CheckpointError("the source became shorter while it was copied; start again")


def _verify(source: int, target: int, shard: NewShard, thorough: bool) -> None:
    """Read the new file back; VerificationError if header or tensors differ from what was to be written."""
    try:
        spans = read_header(target, "", "the copy").tensors
    except CheckpointError:
        raise VerificationError("the copy's header cannot be read back; nothing is kept") from None
    meant = [(piece.name, piece.dtype, piece.shape) for piece in shard.pieces]
    if set(meant) != {(name, span.dtype, span.shape) for name, span in spans.items()}:
        raise VerificationError("the copy's header is not the one that was written; nothing is kept")
    draw = random.Random(len(meant))
    for piece in shard.pieces:
        start = spans[piece.name].start
        windows = [(0, piece.nbytes)] if thorough else probes(piece.nbytes, draw)
        if not all(_same(source, target, piece, start, at, length) for at, length in windows):
            raise VerificationError(f"{shown(piece.name)}: the copy differs from the source; nothing is kept")


def probes(size: int, draw: random.Random) -> list[tuple[int, int]]:
    """(offset, length) of the first, the last and a random page of `size` bytes."""
    length = min(_WINDOW, size)
    return [(at, length) for at in sorted({0, draw.randint(0, size - length), size - length})]


def _same(source: int, target: int, piece: Piece, start: int, at: int, length: int) -> bool:
    if piece.span is not None:
        return same_range(source, target, piece.span.start + at, start + at, length)
    assert piece.data is not None
    return holds(target, start + at, piece.data[at : at + length])


def _write_index(written: _Written, source: Checkpoint, shards: Mapping[str, NewShard]) -> None:
    """The index as transformers writes it, with the source's metadata except sizes."""
    pieces = {piece.name: (piece, name) for name, shard in shards.items() for piece in shard.pieces}
    metadata = {key: value for key, value in source.index_metadata.items() if key != "total_parameters"}
    metadata["total_size"] = sum(piece.nbytes for piece, _ in pieces.values())
    placed = {name: pieces[name][1] for name in sorted(pieces)}
    text = json.dumps({"metadata": metadata, "weight_map": placed}, indent=2) + "\n"
    with written.create(INDEX) as file:
        write_at(file, memoryview(text.encode()), 0)


def counter(progress: Tick | None, total: int) -> Callable[[int], None]:
    done = 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    return moved


def _report(
    source: Checkpoint,
    renamed: Mapping[str, str | None],
    replace: Mapping[str, NewTensor],
    linked: tuple[str, ...],
    files: tuple[str, ...],
) -> CopyReport:
    sizes = {name: span.nbytes for name, span in source.tensors.items()}
    kept = [sizes[old] for old, new in renamed.items() if new is not None and new not in replace]
    dropped = [sizes[old] for old, new in renamed.items() if new is None]
    overwritten = sum(sizes.values()) - sum(kept) - sum(dropped)
    new = sum(memoryview(tensor.data).nbytes for tensor in replace.values())
    return CopyReport(len(kept), len(dropped), sum(kept), sum(dropped), len(replace), linked, files, overwritten, new)
