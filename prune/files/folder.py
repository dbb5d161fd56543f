"""Atomic output: a folder or file appears complete or not at all.

    with new_folder(out) as folder:      # a hidden sibling of `out`, locked by this process
        ...                              # write into it
    # flushed to disk and renamed to `out`; removed instead after any error

A killed run leaves its hidden folder behind; the next run that writes beside it removes it.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dropformer.prune.errors import DropformerError, OutputError, shown

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Error numbers for a disk that is full or read-only."""

TEMPORARY = ".dropformer-"
"""Prefix of temporary folder names."""

_LEFT_OVER = re.compile(re.escape(TEMPORARY) + r"(\d+)-[0-9a-f]{8}")


@contextmanager
def new_folder(out: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that becomes `out` when the block succeeds.

    An existing empty `out` is replaced.  Raises OutputError if `out` exists and is not an empty folder, or if the
    disk is full.  After any exception, KeyboardInterrupt included, nothing is left behind.
    """
    out = _usable(Path(out))
    with _hidden_beside(out) as temporary:
        yield temporary
        flush(temporary)
        _rename(temporary, out)


@contextmanager
def new_file(out: Path | str) -> Iterator[Path]:
    """Yield a temporary path for a file that becomes `out` when the block succeeds; otherwise as `new_folder`.

    Raises OutputError if `out` exists.
    """
    out = _unused(Path(out))
    with _hidden_beside(out) as temporary:
        yield temporary / out.name
        flush(temporary)
        _move(temporary / out.name, out)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_files(out: Path | str) -> Iterator[Path]:
    """Yield a temporary folder whose files move into the folder `out` together when the block succeeds.

    Files of the same names in `out` are replaced, others stay.  After an error in the block `out` is unchanged.
    Raises OutputError if `out` cannot be written.
    """
    out = Path(out)
    with _one_line(out):
        out = out.resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_beside(out) as temporary:
        yield temporary
        flush(temporary)
        made = not out.exists()
        try:
            out.mkdir(exist_ok=True)
            for path in sorted(temporary.iterdir()):
                path.replace(out / path.name)
        except OSError as error:
            if made:
                shutil.rmtree(out, ignore_errors=True)
            raise cannot_write(out, error) from None
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _hidden_beside(out: Path) -> Iterator[Path]:
    """A locked temporary folder beside `out`, which the `with` moves to `out`; removed after any error."""
    with suppress(OSError):  # a failed cleanup of old runs is harmless
        _remove_left_overs(out.parent)
    temporary = out.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    lock = -1
    try:
        lock = _create(temporary)
        yield temporary
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise cannot_write(out, error) from None
        if isinstance(error, DropformerError) and str(temporary) in str(error):
            raise type(error)(str(error).replace(str(temporary), str(out))) from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The error for an OSError on writing at `path`."""
    advice = "free some space or choose another disk" if error.errno in FULL else "choose another folder"
    return OutputError(f"{shown(path, 1000)}: cannot be written ({error.strerror}); {advice}")


def flush(folder: Path) -> None:
    """fsync every file and folder below `folder`."""
    for place, _, files in os.walk(folder):
        for path in [*(Path(place, name) for name in files), Path(place)]:
            if not path.is_symlink():
                _flush_one(path)


def _flush_one(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _usable(out: Path) -> Path:
    """`out` with links resolved and its parent created; OutputError unless it is new or an empty folder."""
    with _one_line(out):
        out = out.resolve()
        if out.is_dir():
            if os.path.ismount(out):
                raise OutputError(f"{shown(out, 1000)}: a mount point; name a folder inside it")
            if any(out.iterdir()):
                raise OutputError(f"{shown(out, 1000)}: exists and is not empty; remove it or name another")
        elif out.exists():
            raise OutputError(f"{shown(out, 1000)}: exists and is not a folder; name another")
        out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _unused(out: Path) -> Path:
    """`out` with its parent resolved and created; OutputError if `out` exists."""
    with _one_line(out):
        out = out.parent.resolve() / out.name
        if os.path.lexists(out):
            raise OutputError(f"{shown(out, 1000)}: exists; remove it or name another")
        out.parent.mkdir(parents=True, exist_ok=True)
    return out


@contextmanager
def _one_line(out: Path) -> Iterator[None]:
    """Turns an OSError about `out` into an OutputError."""
    try:
        yield
    except OSError as error:
        raise cannot_write(out, error) from None
    except RuntimeError:  # how Python before 3.13 reports a symlink loop
        raise OutputError(f"{shown(out, 1000)}: a loop of links; name another folder") from None


def _create(temporary: Path) -> int:
    """Create and lock the folder; the lock is released when this process ends, also when killed."""
    try:
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise cannot_write(temporary, error) from None
    with suppress(OSError):  # some network file systems cannot lock: leftovers then stay
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _rename(temporary: Path, out: Path) -> None:
    try:
        temporary.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _appeared(out) from None
        raise cannot_write(out, error) from None
    _flush_one(out.parent)


def _move(file: Path, out: Path) -> None:
    """Rename a file, never over an existing one; without hard links a race remains."""
    try:
        os.link(file, out)
    except OSError:
        if os.path.lexists(out):
            raise _appeared(out) from None
        file.rename(out)
    _flush_one(out.parent)


def _appeared(out: Path) -> OutputError:
    return OutputError(f"{shown(out, 1000)}: appeared meanwhile; remove it or name another")


def _remove_left_overs(parent: Path) -> None:
    """Remove the temporary folders of dead runs: the process is gone and the lock is free."""
    for path in parent.iterdir():
        match = _LEFT_OVER.fullmatch(path.name)
        if match and not path.is_symlink() and path.is_dir() and not _is_alive(int(match[1])):
            with suppress(OSError):
                _remove_if_unlocked(path)


def _remove_if_unlocked(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
