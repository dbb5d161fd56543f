"""JSON from strangers: one object, no repeated key, no NaN, no bottomless nesting, one line if refused."""

import json
from collections import Counter
from typing import Any, NoReturn

from dropformer.prune.errors import CheckpointError

MAX_BYTES = 100_000_000
"""Upstream's cap on a safetensors header; an index of that size would be as hostile."""


def parse_object(raw: bytes, where: object) -> dict[str, Any]:
    """The JSON object in `raw`.

    where: the file it came from, named in the message.
    Raises CheckpointError if `raw` is anything but one well-formed object in UTF-8.
    """
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where}: expected a JSON object; the file is damaged: download it again")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError(f"{where}: its JSON is nested too deeply; do not use this file") from None
    except ValueError as error:
        raise CheckpointError(
            f"{where}: not valid JSON ({shown(error)}); the file is damaged: download it again"
        ) from None


def shown(value: object, limit: int = 100) -> str:
    """`value` for a message: printable, on one line, not longer than about `limit` characters."""
    text = str(value)
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return text if text.isprintable() else repr(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    counts = Counter(key for key, _ in pairs)
    raise ValueError(f"the key {shown(counts.most_common(1)[0][0])!r} occurs twice")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
