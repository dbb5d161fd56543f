"""Atomic writes to the cache of downloaded and converted models.

Every entry is written beside its final name and renamed, under a lock, so that concurrent runs wait for each other and
an interrupted one leaves no partial entry.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from dropformer.progress import Tell, silent
from dropformer.prune.errors import OutputError


@contextmanager
def building(target: Path, progress: Tell = silent) -> Iterator[Path]:
    """A temporary folder beside `target`, locked against other runs, in which to build it.

    The body renames the finished result to `target` (see `place`).  The rest of the folder is removed, as are leftovers
    of killed runs.  Raises OutputError if the cache cannot be written or its disk is full.
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
    """Whether `lock` is free now."""
    try:
        with lock.acquire(timeout=0):
            return True
    except TimeoutError:
        return False


def place(built: Path, target: Path) -> None:
    """Flush the finished file or folder `built` to disk and rename it to `target`."""
    for path in sorted(built.rglob("*")) if built.is_dir() else [built]:
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    built.replace(target)
