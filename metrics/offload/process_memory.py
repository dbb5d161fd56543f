"""The memory of this process: resident, at its peak, on a GPU; and the part of a budget left for waiting passes."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dropformer.prune.errors import ModelError

if TYPE_CHECKING:
    import torch

    from dropformer.metrics.offload.spill import Spill

MARGIN = 0.05  # of the budget, left free
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Budget:
    """Shares out `memory` bytes: what the process takes anyway, one block, and the rest for waiting passes.

    How much a block's forward pass takes is measured on the first one.  Raises ModelError where not even
    the largest block fits.
    """

    def __init__(self, memory: int, largest: int) -> None:
        self.memory, self.largest = memory, largest
        self._observed = False
        needed = resident() + largest
        if needed > memory * (1 - MARGIN):
            raise ModelError(
                f"--memory {shown(memory)} is too little: the program takes {shown(resident())} and the largest block "
                f"{shown(largest)}; give at least {shown(int(needed * 1.25))}, or compute in --dtype bfloat16"
            )

    def observe(self, spill: Spill, block: int) -> None:
        """Once a first batch has passed a block of `block` bytes: allow what is left of the budget."""
        if not self._observed:
            self._observed = True
            left = self.memory * (1 - MARGIN) - peak() - (self.largest - block)
            spill.allowance = max(0, int(left))


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return _status("VmRSS") or peak()


def return_freed() -> None:
    """Have the C library hand what was freed back to the system, holes between what is in use included.

    glibc keeps them resident, and allocations of ever other places in its heap let a process grow by far more
    than it uses.  Other libraries have no such call; then nothing happens.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak() -> int:
    """The most bytes of this process that were in memory at once."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or (usage if sys.platform == "darwin" else usage * 1024)


class PeakMemory:
    """The most memory that was held beyond what was in use at the start.

    `source`: "cuda": what torch's allocator gave out on the device.  "rss": the resident set's high-water mark, set
    back first (Linux), which counts pages of the whole process: other threads, weights that are read for the first
    time, libraries that are loaded.  "rss (lifetime)": a mark that cannot be set back, so that an earlier peak hides a
    lower one.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        import torch

        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.source, self._start = "cuda", torch.cuda.memory_allocated(self.device)
            return
        return_freed()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.source, self._start = "rss", resident()
        except OSError:
            self.source, self._start = "rss (lifetime)", peak()

    @property
    def extra(self) -> int:
        """Bytes beyond those in use at the start."""
        if self.source != "cuda":
            return max(0, peak() - self._start)
        import torch

        torch.cuda.synchronize(self.device)
        return max(0, torch.cuda.max_memory_allocated(self.device) - self._start)


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def parse_bytes(text: str) -> int:
    """`2GiB`, `500MB` or a number of bytes.  Raises ModelError for anything else."""
    number = text.strip().rstrip("BbiKkMmGgTt")
    unit = text.strip()[len(number) :].upper().removesuffix("B")
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise ModelError(f"`{text}` is not an amount of memory; expected for example 2GiB or 500MB")
    return size


def shown(size: int) -> str:
    return f"{size / 2**30:.2f}GiB" if size >= 2**30 else f"{size / 2**20:.0f}MiB"
