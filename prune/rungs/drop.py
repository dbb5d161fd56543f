"""Nothing in the layer's place."""

from __future__ import annotations

from dataclasses import dataclass

from dropformer.prune.errors import PlanError


@dataclass(frozen=True)
class Dropped:
    """A dropped layer: no cache, no parameters."""

    def __str__(self) -> str:
        return "drop"

    def held(self, context: int) -> int:
        return 0

    def parameters(self, owned: int) -> int:
        return 0


def parse(text: str) -> Dropped:
    """Raises PlanError for anything behind the name."""
    if text:
        raise PlanError(f"rung `drop:{text}` takes no number; write drop")
    return Dropped()
