"""Drop specs as an estimate and a sweep take them: light, so that a wrong one is answered at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dropformer.prune.errors import PlanError
from dropformer.prune.spec import Selector


def drops_of(selectors: Sequence[Selector]) -> dict[str, Any]:
    """A drop spec as an estimate takes it: kind -> count, or the set of blocks.  Raises PlanError."""
    drops: dict[str, Any] = {}
    for selector in selectors:
        counted = not (selector.kind == "joint" or selector.percent or selector.stack or selector.published)
        if not counted or selector.kind in drops:
            raise PlanError(f"an estimate takes attn:N, mlp:N, block:N or lists of blocks, each once, not `{selector}`")
        drops[selector.kind] = set(selector.indices) if selector.indices is not None else selector.count
    return drops


def parse_range(text: str) -> tuple[str, list[int]]:
    """`attn:0..12` or `attn:0..12..4` -> ("attn", [0, 1, ..., 12]).  Raises PlanError."""
    kind, _, numbers = text.replace(" ", "").partition(":")
    parts = numbers.split("..")
    known = 2 <= len(parts) <= 3 and all(part.isdecimal() for part in parts)
    first, last, step = [*map(int, parts), 1][:3] if known else (0, 0, 0)
    if first >= last or step == 0:
        raise PlanError(f"`{text}` is no range of drops; expected for example attn:0..12 or mlp:0..8..2")
    return kind, list(range(first, last + 1, step))
