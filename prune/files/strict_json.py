"""Untrusted JSON: one object, no repeated keys, no NaN, bounded size and nesting."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from dropformer.prune.errors import CheckpointError, shown
from dropformer.prune.files.regular import opened

MAX_BYTES = 100_000_000
"""Upstream's cap on a safetensors header."""

CONFIG_BYTES = 16 << 20
"""Cap on config.json and similar files; those of published models are below 1 MiB."""

MAX_DEPTH = 64
"""Deepest nesting; configs have about five levels, and copying one recurses."""

MAX_VALUES = 2_000_000
"""Values per file; at about 60 bytes each in Python, 120 MB."""


def read_object(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a regular file of at most `limit` bytes.

    Raises CheckpointError for anything else; a FIFO or a device is not read.
    """
    with opened(path) as file:
        raw = file.read(limit + 1)
    where = shown(path, 1000)
    if len(raw) > limit:
        raise CheckpointError(f"{where}: more than the {limit:,} bytes that such a file may have; do not use it")
    return parse_object(raw, where)


def parse_object(raw: bytes, where: object, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object in `raw`.

    where: the file's name in messages.  max_values: limit on commas and brackets, also those in strings, checked
    before parsing.
    Raises CheckpointError if `raw` is anything but one well-formed object in UTF-8.
    """
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where}: expected a JSON object; the file is damaged: download it again")
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > max_values:
        raise CheckpointError(f"{where}: more than {max_values:,} JSON values in one file; do not use it")
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError(f"{where}: its JSON is nested too deeply; do not use this file") from None
    except ValueError as error:
        raise CheckpointError(
            f"{where}: not valid JSON ({shown(error)}); the file is damaged: download it again"
        ) from None
    if depth(found) > MAX_DEPTH:
        raise CheckpointError(f"{where}: its JSON is nested too deeply; do not use this file")
    return found


def depth(value: Any) -> int:
    """Levels of lists and objects, without recursion: 0 for a number, 2 for {"a": [1]}."""
    level, layer = 0, [value]
    while layer := [item for item in layer if isinstance(item, (dict, list))]:
        level += 1
        layer = [inner for item in layer for inner in (item.values() if isinstance(item, dict) else item)]
    return level


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    counts = Counter(key for key, _ in pairs)
    raise ValueError(f"the key {shown(counts.most_common(1)[0][0])!r} occurs twice")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
