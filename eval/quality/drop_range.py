"""The range of drops that a sweep takes.  Light, so that a wrong one is answered before torch is imported."""

from __future__ import annotations

from dropformer.prune.errors import PlanError


def parse_range(text: str) -> tuple[str, list[int]]:
    """`attn:0..12` or `attn:0..12..4` -> ("attn:{}", [0, 1, ..., 12]), a spec with a place for the number.

    `window:0..12@256+4` -> ("window:{}@256+4", ...).  Raises PlanError.
    """
    kind, _, numbers = text.replace(" ", "").partition(":")
    numbers, at, window = numbers.partition("@")
    parts = numbers.split("..")
    known = 2 <= len(parts) <= 3 and all(part.isdecimal() for part in parts) and bool(at) == (kind == "window")
    first, last, step = [*map(int, parts), 1][:3] if known else (0, 0, 0)
    if first >= last or step == 0:
        raise PlanError(
            f"`{text}` is no range of drops; expected for example attn:0..12, mlp:0..8..2 or window:0..12..4@256+4"
        )
    return f"{kind}:{{}}{at}{window}", list(range(first, last + 1, step))
