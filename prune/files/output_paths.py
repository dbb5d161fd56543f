"""Early checks of output folders, and the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_dir

from dropformer.prune.errors import OutputError


def check_out(out: Path, own: str) -> None:
    """Raises OutputError unless `out` is new, empty, or holds `own`, a file of an earlier run."""
    check_place(out)
    if out.is_dir() and any(out.iterdir()) and not (out / own).exists():
        raise OutputError(f"{out} is not empty and holds no {own}; choose another --out or remove it")


def check_empty(out: Path) -> None:
    """Raises OutputError if a checkpoint could not be written."""
    check_place(out)
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} exists and is not an empty folder; choose another --out or remove it")


def check_place(out: Path) -> None:
    """Raises OutputError unless `out` is a writable folder or could be created."""
    nearest = _nearest(out)
    if not nearest.is_dir():
        said = "" if nearest == out.absolute() else f", and {out} would lie in it"
        raise OutputError(f"{nearest} is a file{said}; choose another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be written: no permission to write in {nearest}; choose another --out")


def _nearest(out: Path) -> Path:
    """`out` itself if it exists, else its nearest existing parent."""
    whole = out.absolute()
    for path in (whole, *whole.parents):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # name too long, symlink loop, no permission to enter a folder
            raise OutputError(f"{out} cannot be written ({error.strerror}); choose another --out") from None
        return path
    return whole


def cache_folder() -> Path:
    """`$DROPFORMER_CACHE`, or the user's cache folder for dropformer.  It need not exist yet."""
    chosen = os.environ.get("DROPFORMER_CACHE")
    return Path(chosen).expanduser() if chosen else Path(user_cache_dir("dropformer", appauthor=False))
