"""The folder where fetched and converted models are kept, and how to write into it safely.

Every entry appears whole or not at all: it is written beside its final name and renamed there, under
a lock, so that concurrent runs wait for each other and an interrupted one leaves nothing wrong.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from dropformer.prune.errors import OutputError

Progress = Callable[[str], None]
"""Called with one line of text for a person whenever there is news."""


def silent(_: str) -> None:
    """The progress callback of those who want none."""


@contextmanager
def building(target: Path, progress: Progress = silent) -> Iterator[Path]:
    """A temporary folder beside `target`, for building it; locked against every other run.

    The body must build into the folder that it is given and rename what is finished to `target`.
    Whatever is left in the folder afterwards is removed, also what an earlier, killed run left.

    Raises OutputError when the cache cannot be written or its disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        if not _free(lock):
            progress(f"waiting for another run that is making {target.name}")
        with lock:
            for stale in target.parent.glob(f".{target.name}.tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.tmp-", dir=target.parent) as folder:
                yield Path(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write {target}: {reason}; free some space there or set DROPFORMER_CACHE to another folder"
        ) from error


def _free(lock: FileLock) -> bool:
    """Whether nobody holds `lock` at this moment."""
    try:
        with lock.acquire(timeout=0):
            return True
    except TimeoutError:
        return False


def place(built: Path, target: Path) -> None:
    """Move the finished file or folder `built` to `target`, on the disk before it is in sight."""
    for path in sorted(built.rglob("*")) if built.is_dir() else [built]:
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    built.replace(target)
