"""A linear map in the layer's place."""

from __future__ import annotations

from dataclasses import dataclass

from dropformer.prune.errors import PlanError


@dataclass(frozen=True)
class LinearMap:
    """A square matrix and a bias: no cache; never more parameters than the layer had, by budgets' count."""

    def __str__(self) -> str:
        return "linear"

    def held(self, context: int) -> int:
        return 0

    def seen(self, context: int) -> float:
        return 0.0

    def parameters(self, owned: int, width: int) -> int:
        return min(owned, width * (width + 1))


def parse(text: str) -> LinearMap:
    """Raises PlanError for anything behind the name."""
    if text:
        raise PlanError(f"rung `linear:{text}` takes no number; write linear")
    return LinearMap()
