"""The range of drops that a sweep takes.  Light, so that a wrong one is answered before torch is imported."""

from __future__ import annotations

from dropformer.prune.errors import PlanError


def parse_range(text: str) -> tuple[str, list[int]]:
    """`attn:0..12` or `attn:0..12..4` -> ("attn", [0, 1, ..., 12]).  Raises PlanError."""
    kind, _, numbers = text.replace(" ", "").partition(":")
    parts = numbers.split("..")
    known = 2 <= len(parts) <= 3 and all(part.isdecimal() for part in parts)
    first, last, step = [*map(int, parts), 1][:3] if known else (0, 0, 0)
    if first >= last or step == 0:
        raise PlanError(f"`{text}` is no range of drops; expected for example attn:0..12 or mlp:0..8..2")
    return kind, list(range(first, last + 1, step))
