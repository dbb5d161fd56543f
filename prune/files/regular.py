"""Only regular files, and only those inside the model's folder or the Hub cache behind it."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dropformer.prune.errors import CheckpointError, shown

READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: a FIFO must not hang us


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file, open for reading.  Raises CheckpointError for a FIFO, a device, a folder, an unreadable file."""
    try:
        descriptor = os.open(path, READ_FLAGS)
    except OSError as error:
        raise CheckpointError(f"{shown(path, 1000)}: cannot be read ({error.strerror}); check the path") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{shown(path, 1000)}: not a regular file; put the file itself there")
    with os.fdopen(descriptor, "rb") as raw:
        yield raw


def file_behind(folder: Path, name: str) -> Path:
    """The regular file that folder/name is or links to; CheckpointError if it is missing or elsewhere."""
    target = check_inside(folder, name)
    if not target.is_file():
        raise CheckpointError(f"{shown(folder / name, 1000)}: not a regular file; put the file itself there")
    return target


def check_inside(folder: Path, name: str) -> Path:
    """What folder/name is or links to, once it is certain that it belongs to the folder; raises as `file_behind`."""
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(f"{shown(path, 1000)}: missing; download the model again") from None
    except (OSError, RuntimeError):  # Python before 3.13 reports a loop of links as RuntimeError
        raise CheckpointError(f"{shown(path, 1000)}: a loop of links; copy the file there") from None
    if not any(target.is_relative_to(root) for root in link_roots(folder)):
        raise CheckpointError(f"{shown(path, 1000)}: a link that leads out of the folder; copy the file there")
    return target


def link_roots(folder: Path) -> list[Path]:
    """Where a link may lead: the folder; for a Hub snapshot its repository's cache, and the shared blobs."""
    folder = folder.resolve()
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return [folder, parent.parent / "blobs", parent.parent.parent / "blobs"]
    return [folder]
