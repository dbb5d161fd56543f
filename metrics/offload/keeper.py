"""Tensors that outlive a step: streams, inputs, fitted changes.  On the device, in host memory, or in files."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

SMALLEST = 64 << 10  # bytes; a smaller tensor stays where it is
DEVICE_SHARE = 0.25  # of a GPU's free memory, for what is kept there


class Keeper:
    """Keeps tensors within an allowance of memory each for the device and the host, the rest in unnamed files.

    A kept tensor is an ordinary tensor: on its own device, on the CPU, or mapped from a file that vanishes with
    the last reference to it.  `host`: bytes of host memory, None for no limit.  On a GPU, a quarter of
    what is free there when the first tensor comes.
    """

    def __init__(self, host: int | None = None, folder: Path | None = None) -> None:
        self.host, self.folder = host, folder
        self.device: int | None = None
        self.held = {"device": 0, "host": 0, "disk": 0}
        self.peak = dict(self.held)
        self._files: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor where it may stay; its values do not change.  Storage that it shares with others is not freed."""
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu":
            if self.held["device"] + size <= self._on_device(tensor.device):
                return self._count("device", tensor, size)
            tensor = tensor.cpu()
        if size < SMALLEST or self.host is None or self.held["host"] + size <= self.host:
            return self._count("host", tensor, size)
        kept = self._count("disk", self._mapped(tensor), size)
        self._files[id(kept)] = kept
        return kept

    def release(self) -> None:
        """Give back the memory of what was read from files: it is read again where it is used again."""
        for tensor in list(self._files.values()):
            forget(tensor)

    def _on_device(self, device: torch.device) -> int:
        if self.device is None:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            self.device = int(DEVICE_SHARE * free) if device.type == "cuda" else 1 << 62
        return self.device

    def _count(self, where: str, tensor: Tensor, size: int) -> Tensor:
        kept = tensor.view(tensor.shape)  # an object of its own, whose end is noticed
        self.held[where] += size
        self.peak[where] = max(self.peak[where], self.held[where])
        weakref.finalize(kept, self._released, where, size)
        return kept

    def _released(self, where: str, size: int) -> None:
        self.held[where] -= size

    def _mapped(self, tensor: Tensor) -> Tensor:
        """A copy in a file that has no name any more, read page by page as it is used."""
        handle, path = tempfile.mkstemp(prefix="dropformer-", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            found = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            Path(path).unlink()
        return found.view(tensor.shape)


def forget(tensor: Tensor) -> None:
    """Drop the pages of a tensor that is mapped, shared, from a file of its own: the file still has its bytes."""
    advise = getattr(mmap, "MADV_DONTNEED", None)  # neither on Windows nor on every Unix
    if advise is None:
        return
    storage = tensor.untyped_storage()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), ctypes.c_int(advise))
