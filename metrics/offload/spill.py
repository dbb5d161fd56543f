"""What waiting forward passes hold, moved to disk where memory is short.

A suspended pass holds its tensors in the local variables of its frames.  Moving one out keeps the tensor
and all views of it, and empties only the storage behind them, so that everything is as it was once the
bytes are back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import torch
from torch import Tensor

SMALLEST = 16 << 10  # bytes; a smaller storage is not worth a write


class Spill:
    """Keeps up to `allowance` bytes of waiting passes in memory and the rest in files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.allowance = folder, 0
        self.resident = 0
        self._out: dict[int, list[tuple[torch.UntypedStorage, int]]] = {}
        self._in: dict[int, int] = {}
        self.peak_on_disk = 0

    def park(self, number: int, frame: FrameType | None, keep: set[int]) -> None:
        """Put away what the frames of pass `number` hold, storages at the addresses in `keep` excepted."""
        storages = [s for s in storages_in(frame) if _movable(s) and s.data_ptr() not in keep]
        size = sum(storage.nbytes() for storage in storages)
        if self.resident + size <= self.allowance:
            self.resident += size
            self._in[number] = size
            return
        with self._file(number).open("wb") as file:
            for storage in storages:
                _write(storage, file)
        self._out[number] = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)
        self.peak_on_disk = max(self.peak_on_disk, sum(n for out in self._out.values() for _, n in out))

    def restore(self, number: int) -> None:
        """Bring back what `park` put away."""
        self.resident -= self._in.pop(number, 0)
        if number in self._out:
            with self._file(number).open("rb") as file:
                for storage, size in self._out.pop(number):
                    storage.resize_(size)
                    _fill(storage, file)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.bin"


def _movable(storage: torch.UntypedStorage) -> bool:
    return storage.nbytes() >= SMALLEST and storage.resizable()


def _write(storage: torch.UntypedStorage, file: BinaryIO) -> None:
    on_cpu = storage.cpu()
    file.write(_memory(on_cpu))


def _fill(storage: torch.UntypedStorage, file: BufferedReader) -> None:
    if storage.device.type == "cpu":
        file.readinto(_memory(storage))
    else:
        landing = torch.UntypedStorage(storage.nbytes())
        file.readinto(_memory(landing))
        storage.copy_(landing)


def _memory(storage: torch.UntypedStorage) -> ctypes.Array:
    """The bytes themselves.  Not by way of NumPy: a storage that NumPy has seen cannot be resized any more."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def storages_in(frame: FrameType | None) -> list[torch.UntypedStorage]:
    """The storages behind all tensors in the local variables of a frame and of those that called it."""
    found: dict[int, torch.UntypedStorage] = {}
    while frame is not None:
        for tensor in _tensors(list(frame.f_locals.values()), 4):
            storage = tensor.untyped_storage()
            found.setdefault(storage.data_ptr(), storage)
        frame = frame.f_back
    return list(found.values())


def _tensors(tree: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        if not isinstance(tree, torch.nn.Parameter) and not tree.is_meta:
            yield tree
    elif depth and isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()), depth - 1)
    elif depth and isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item, depth - 1)
