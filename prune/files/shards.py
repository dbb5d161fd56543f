"""A checkpoint folder as named byte ranges: validated headers, nothing loaded, nothing executed.

    checkpoint = open_checkpoint(folder)
    checkpoint.tensors["model.norm.weight"]   # TensorSpan(shard, dtype, shape, start, end)
    checkpoint.read("model.norm.weight")      # its bytes

Only safetensors is read: `model.safetensors`, else the shards of `model.safetensors.index.json` (the order of
transformers).  A symbolic link may not lead out of the folder, except from a snapshot of the Hub cache to its blobs.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dropformer.prune.errors import CheckpointError, shown
from dropformer.prune.files.byteranges import read_at
from dropformer.prune.files.config_json import CONFIG, check_counts
from dropformer.prune.files.regular import READ_FLAGS, file_behind, opened
from dropformer.prune.files.safetensors_header import TensorSpan, read_header
from dropformer.prune.files.side_files import check_no_adapter, list_side_files
from dropformer.prune.files.strict_json import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

INDEX_BYTES = 64 << 20
"""Cap on an index; for 90,000 tensors it has 9 MiB."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SAMPLED_TENSORS = 4096
_SAMPLE_BYTES = 512


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name in the folder, the file behind it, and its `__metadata__`."""

    name: str
    path: Path
    size: int
    metadata: Mapping[str, str]
    identity: tuple[int, int, int, int]

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the file whose header was validated; CheckpointError if it was replaced, or is changed
        before the block ends.
        """
        try:
            file = os.open(self.path, READ_FLAGS)
        except OSError as error:
            raise CheckpointError(f"{_line(self.path)}: gone while in use ({error.strerror})") from None
        try:
            self._check_unchanged(file)
            yield file
            self._check_unchanged(file)
        finally:
            os.close(file)

    def _check_unchanged(self, file: int) -> None:
        if _identity(os.fstat(file)) != self.identity:
            raise CheckpointError(f"{_line(self.path)}: changed while in use; start again")


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a folder: shards sorted by name, tensors in file order."""

    folder: Path
    shards: Mapping[str, Shard]
    tensors: Mapping[str, TensorSpan]
    index_metadata: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(span.nbytes for span in self.tensors.values())

    @property
    def metadata(self) -> dict[str, Mapping[str, str]]:
        """The `__metadata__` of every shard, by its name."""
        return {name: shard.metadata for name, shard in self.shards.items()}

    def read(self, name: str) -> bytes:
        """The bytes of one tensor, little-endian and row-major as in the file."""
        span = self.tensors[name]
        with self.shards[span.shard].opened() as file:
            return read_at(file, span.nbytes, span.start)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 that distinguishes checkpoints, also of one training run, and reads at most 4 MiB.

        Over the tensors sorted by name, independent of shards: name, dtype and shape of each, then 512 bytes from
        the start and from the middle of each (of at most 4096 tensors, evenly spaced).  It does not authenticate:
        bytes outside of the sample may differ.
        """
        digest = hashlib.sha256()
        names = sorted(self.tensors)
        for name in names:
            span = self.tensors[name]
            digest.update(repr((name, span.dtype, span.shape, span.nbytes)).encode())
        for sample in self._samples(names[:: -(-len(names) // _SAMPLED_TENSORS)]):
            digest.update(sample)
        return digest.hexdigest()

    def _samples(self, names: list[str]) -> Iterator[bytes]:
        """Start and middle of each tensor, in the order of names; each shard is opened once."""
        found: dict[str, bytes] = {}
        for shard in self.shards.values():
            with shard.opened() as file:
                for name in names:
                    span = self.tensors[name]
                    if span.shard == shard.name:
                        found[name] = _ends(file, span)
        return (found[name] for name in names)


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Find and validate the safetensors files of a Hugging Face checkpoint folder.

    Raises CheckpointError for a checkpoint that is incomplete, damaged, hostile or of another format.
    """
    try:
        folder = Path(folder).resolve(strict=True)
        return _open(folder)
    except (OSError, RuntimeError) as error:  # Python before 3.13 reports a loop of links as RuntimeError
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CheckpointError(f"{_line(folder)}: cannot be read ({shown(reason)}); check the path") from None


def _open(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(f"{_line(folder)}: a file; give the folder that holds it and config.json")
    placed, index_metadata = ({}, {}) if os.path.lexists(folder / SINGLE) else _read_index(folder)
    opened = [_open_shard(folder, name) for name in sorted(set(placed.values())) or [SINGLE]]
    if placed:
        _check_index(folder, placed, [spans for _, spans in opened])
    shards = {shard.name: shard for shard, _ in opened}
    tensors = {name: span for _, spans in opened for name, span in spans.items()}
    if not tensors:
        raise CheckpointError(f"{_line(folder)}: its safetensors files hold no tensors; nothing to work on")
    if not os.path.lexists(folder / CONFIG):
        raise CheckpointError(f"{_line(folder)}: config.json is missing; copy it from the original model")
    side = list_side_files(folder)
    file_behind(folder, CONFIG)
    check_counts(read_object(folder / CONFIG), tensors.values(), _line(folder))
    check_no_adapter((*side.carried, CONFIG), _line(folder))
    return Checkpoint(folder, shards, tensors, index_metadata)


def _open_shard(folder: Path, name: str) -> tuple[Shard, Mapping[str, TensorSpan]]:
    path = file_behind(folder, name)
    with opened(path) as file:
        status = os.fstat(file.fileno())
        header = read_header(file.fileno(), name, _line(folder / name))
        return Shard(name, path, status.st_size, header.metadata, _identity(status)), header.tensors


def _read_index(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """weight_map (tensor to shard) and metadata of the index, with file names checked."""
    if not os.path.lexists(folder / INDEX):
        raise CheckpointError(_why_no_weights(folder))
    where = _line(folder / INDEX)
    index = read_object(file_behind(folder, INDEX), INDEX_BYTES)
    placed, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(placed, dict) or not placed or not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: has no weight_map; download it again")
    for shard in placed.values():
        if not _is_plain_name(shard):
            raise CheckpointError(
                f"{where}: names the file {shown(repr(shard))}, not a .safetensors beside it; do not use it"
            )
    return placed, metadata


def _is_plain_name(name: Any) -> bool:
    """Whether an index may name this file: no path separators, not hidden, printable."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & set("/\\:")
    )


def _check_index(folder: Path, placed: Mapping[str, str], shards: list[Mapping[str, TensorSpan]]) -> None:
    held = [(name, span.shard) for spans in shards for name, span in spans.items()]
    wrong = next((name for name, shard in held if placed.get(name) != shard), None)
    if wrong is None and len(held) < len(placed):
        wrong = next(iter(placed.keys() - {name for name, _ in held}))
    if wrong is not None:
        raise CheckpointError(
            f"{_line(folder / INDEX)}: does not say where the shards hold {shown(wrong)!r}; index and shards are of "
            "different versions of the model: get all of them from one"
        )


def _why_no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickle = next((name for name in names if name.endswith(_PICKLES)), None)
    other = next((name for name in names if name.endswith(".safetensors")), None)
    if other:
        return f"{_line(folder)}: holds {shown(other)} but neither {SINGLE} nor {INDEX}; download the model again"
    if pickle:
        return (
            f"{_line(folder)}: {shown(pickle)} is a pickle, which can run code and is never opened; convert it "
            "once, where you trust it: AutoModelForCausalLM.from_pretrained(A).save_pretrained(B)"
        )
    return f"{_line(folder)}: no {SINGLE} and no {INDEX} there; give the folder of a Hugging Face checkpoint"


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _ends(file: int, span: TensorSpan) -> bytes:
    length = min(_SAMPLE_BYTES, span.nbytes)
    middle = min(span.start + span.nbytes // 2, span.end - length)
    return os.pread(file, length, span.start) + os.pread(file, length, middle)


def _line(path: Path | str) -> str:
    return shown(path, limit=1000)
