"""Copying and comparing byte ranges between open files, at the speed of the page cache.

copy_file_range copies page by page in the kernel: a range with another offset in its page than its copy takes twice
the time, so it is copied through a buffer that stays in the CPU cache instead.  Either way the first chunk ends where
the target reaches a multiple of 64 KiB or of the buffer: the page cache then gets whole large folios, which saves a
third of the time, and file systems that can (XFS, Btrfs) share the blocks from there on, as with `cp`.
"""

import errno
import os
from collections.abc import Callable

PAGE = 4096
"""Bytes in a page of the page cache, and in a block of most file systems."""

FOLIO = 64 << 10
"""Bytes of a large folio of the page cache."""

KERNEL_CHUNK = 64 << 20
BUFFER = 1 << 20

_UNSUPPORTED = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY)


def copy_range(source: int, target: int, start: int, at: int, length: int, moved: Callable[[int], None]) -> bool:
    """Copy `length` bytes from offset `start` of one descriptor to offset `at` of another.

    moved: called with the number of bytes of each chunk, for progress.
    Returns False if the source ends too early.
    """
    in_kernel = (start - at) % PAGE == 0 and hasattr(os, "copy_file_range")
    while length:
        copy = _in_kernel if in_kernel else _through_buffer
        count = copy(source, target, start, at, length)
        if not count and not in_kernel:
            return False
        in_kernel = in_kernel and count > 0
        start, at, length = start + count, at + count, length - count
        moved(count)
    return True


def same_range(source: int, target: int, start: int, at: int, length: int) -> bool:
    """Whether two descriptors hold the same `length` bytes at offsets `start` and `at`."""
    for done in range(0, length, BUFFER):
        count = min(BUFFER, length - done)
        there = os.pread(target, count, at + done)
        if len(there) < count or there != os.pread(source, count, start + done):
            return False
    return True


def holds(file: int, at: int, data: memoryview) -> bool:
    """Whether a descriptor holds `data` at offset `at`."""
    for done in range(0, len(data), BUFFER):
        part = bytes(data[done : done + BUFFER])
        if os.pread(file, len(part), at + done) != part:
            return False
    return True


def read_at(file: int, length: int, at: int) -> bytes:
    """`length` bytes from offset `at`, fewer at the end of the file; in a loop, as one call reads at most 2 GiB."""
    parts = []
    while length and (part := os.pread(file, length, at)):
        parts.append(part)
        length, at = length - len(part), at + len(part)
    return b"".join(parts)


def write_at(target: int, data: memoryview, at: int) -> None:
    """Write all of `data` at offset `at`."""
    while data:
        count = os.pwrite(target, data, at)
        data, at = data[count:], at + count


def _in_kernel(source: int, target: int, start: int, at: int, length: int) -> int:
    """Bytes copied; 0 if the kernel cannot copy between these files, or at the end of the source."""
    chunk = -at % FOLIO or KERNEL_CHUNK
    try:
        return os.copy_file_range(source, target, min(length, chunk), start, at)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return 0
        raise


def _through_buffer(source: int, target: int, start: int, at: int, length: int) -> int:
    data = os.pread(source, min(length, BUFFER - at % BUFFER), start)
    write_at(target, memoryview(data), at)
    return len(data)
