"""Opening regular files only, and only inside the model's folder or its Hub cache."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dropformer.prune.errors import CheckpointError, shown

READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: opening a FIFO must not block


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file.  Raises CheckpointError for a FIFO, a device, a folder or an unreadable file."""
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
    """The regular file that folder/name is or links to; CheckpointError if it is missing or outside."""
    target = check_inside(folder, name)
    if not target.is_file():
        raise CheckpointError(f"{shown(folder / name, 1000)}: not a regular file; put the file itself there")
    return target


def check_inside(folder: Path, name: str) -> Path:
    """The path that folder/name is or links to; CheckpointError if it is missing or outside of the folder."""
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        what = "missing, a link to it is left; remove that, or" if path.is_symlink() else "missing;"
        raise CheckpointError(f"{shown(path, 1000)}: {what} download the model again") from None
    except (OSError, RuntimeError):  # RuntimeError: a symlink loop, before Python 3.13
        raise CheckpointError(f"{shown(path, 1000)}: a loop of links; copy the file there") from None
    if not any(target.is_relative_to(root) for root in link_roots(folder)):
        raise CheckpointError(f"{shown(path, 1000)}: a link that leads out of the folder; copy the file there")
    return target


def link_roots(folder: Path) -> list[Path]:
    """Folders that a link may point to: the folder itself; for a Hub snapshot also its and the shared blobs."""
    folder = folder.resolve()
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return [folder, parent.parent / "blobs", parent.parent.parent / "blobs"]
    return [folder]
