"""A linear map in the layer's place."""

from __future__ import annotations

from dataclasses import dataclass

from dropformer.prune.errors import PlanError


@dataclass(frozen=True)
class LinearMap:
    """A square matrix and a bias: no cache; as many parameters as the layer had at most, which is what is counted."""

    def __str__(self) -> str:
        return "linear"

    def held(self, context: int) -> int:
        return 0

    def parameters(self, owned: int) -> int:
        return owned


def parse(text: str) -> LinearMap:
    """Raises PlanError for anything behind the name."""
    if text:
        raise PlanError(f"rung `linear:{text}` takes no number; write linear")
    return LinearMap()
