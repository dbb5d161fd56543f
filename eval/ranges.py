"""Ranges of drop counts, as `prune sweep` takes them."""

from __future__ import annotations

from dropformer.prune.errors import PlanError


def parse_range(text: str) -> tuple[str, list[int]]:
    """`attn:0..12` or `attn:0..12..4` -> ("attn", [0, 1, ..., 12]).  Raises PlanError."""
    kind, _, numbers = text.replace(" ", "").partition(":")
    parts = numbers.split("..")
    if not 2 <= len(parts) <= 3 or not all(p.isdecimal() for p in parts) or int(parts[0]) >= int(parts[1]):
        raise PlanError(f"`{text}` is no range of drops; expected for example attn:0..12 or mlp:0..8..2")
    step = int(parts[2]) if len(parts) == 3 else 1
    return kind, list(range(int(parts[0]), int(parts[1]) + 1, max(1, step)))
