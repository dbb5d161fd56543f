"""Rows kept on disk as they are measured, so that a long analysis resumes after a kill.

The file has one JSON object per line: first what was measured on what, then one line per window.  Lines are
only ever added; one that a kill has torn is dropped on reading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout
from pydantic import ValidationError

from dropformer.metrics.analysis.capture import WindowScores
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.prune.artifact import FrozenRecord

SCHEMA = 1


class Header(FrozenRecord):
    """What a file of rows was measured on; rows of anything else are never mixed in."""

    artifact: str = "rows"
    schema_version: int = SCHEMA
    fingerprint: str
    calibration: CalibrationRef
    dtype: str
    layers: tuple[str, ...]


class RowsFile:
    """The rows of one analysis, window by window.  `done` is what an earlier run left.

    While one process writes a file, others run without it.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.done: dict[int, WindowScores] = {}
        self._lock = FileLock(path.with_name(path.name + ".lock"))
        self._file: IO[str] | None = None

    def __enter__(self) -> RowsFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self.done = _read(self.path, self.header)
            self._rewrite()
        except (Timeout, OSError):  # another run's, or a cache that cannot be written: measure without it
            self._file = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()
            self._file = None
        self._lock.release()

    def add(self, rows: Mapping[int, WindowScores]) -> None:
        """Write the rows of these windows, and hand them to the system before returning."""
        if self._file:
            try:
                self._file.writelines(_line(window, row) for window, row in sorted(rows.items()))
                self._file.flush()
            except OSError:  # the disk is full: measure on without it
                self._file = None

    def text(self) -> str:
        """What `done` holds, as `parse` reads it."""
        return "".join(_line(window, row) for window, row in sorted(self.done.items()))

    def parse(self, text: str) -> dict[int, WindowScores]:
        """The rows in lines of such a file; reading ends at the first that is torn."""
        return _rows(text.splitlines(), len(self.header.layers))

    def remove(self) -> None:
        """Delete the file: its scores are complete and kept elsewhere."""
        if self._file:
            self.path.unlink(missing_ok=True)

    def _rewrite(self) -> None:
        """Header and whole lines only, in place of what a kill may have torn; then open for adding."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(self.header.model_dump_json() + "\n" + self.text(), encoding="utf-8")
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")


def _read(path: Path, header: Header) -> dict[int, WindowScores]:
    """The rows in a file with this very header; none where there is no such file."""
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        if Header.model_validate_json(first) != header:
            return {}
    except (OSError, ValueError, ValidationError):
        return {}
    return _rows(lines, len(header.layers))


def _rows(lines: Sequence[str], layers: int) -> dict[int, WindowScores]:
    found: dict[int, WindowScores] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            found[int(entry["window"])] = _row(entry, layers)
        except (ValueError, KeyError, TypeError):
            break  # torn: nothing after it was written by that run
    return found


def _line(window: int, row: WindowScores) -> str:
    sums = [value if value == value else None for value in row.sums[0].tolist()]
    return json.dumps({"window": window, "sums": sums, "tokens": row.tokens[0].tolist()}) + "\n"


def _row(entry: Mapping[str, Any], layers: int) -> WindowScores:
    sums = [torch.nan if value is None else float(value) for value in entry["sums"]]
    tokens: Sequence[int] = [int(value) for value in entry["tokens"]]
    if len(sums) != layers or len(tokens) != layers:
        raise ValueError("a row of another model")
    return WindowScores(torch.tensor([sums], dtype=torch.float64), torch.tensor([tokens]))
