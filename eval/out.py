"""Folders that a command may write into again: what an earlier run of it left is replaced, all else is not."""

from __future__ import annotations

from pathlib import Path

from dropformer.prune.errors import OutputError


def check_out(out: Path, own: str) -> None:
    """Raises OutputError unless `out` is new, empty, or holds `own`, the file by which an earlier run is known."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / own).exists():
        raise OutputError(f"{out} is not empty and holds no {own}; choose another --out or remove it")
