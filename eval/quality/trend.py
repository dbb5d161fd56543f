"""Is a plan beyond a cliff: its first drops alone, measured cheaply, show the trend that the whole plan leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dropformer.eval.quality.cliff import cliff
from dropformer.eval.quality.perplexity import perplexity
from dropformer.prune.artifact import FrozenRecord
from dropformer.prune.plan import Plan
from dropformer.prune.surgery.views import without

AT_LEAST = 4  # drops; fewer have no trend to leave
WINDOWS = 2


class Trend(FrozenRecord):
    """Log-perplexity of a plan's first drops alone, as (drops, nats) pairs; `cliff`: the first beyond it."""

    points: list[tuple[int, float]]
    drops: int
    cliff: int | None

    def __str__(self) -> str:
        return (
            f"beyond a cliff: quality leaves its trend between {self._before} and {self.cliff} of the {self.drops} "
            "drops; drop fewer, or see `prune sweep`"
        )

    @property
    def _before(self) -> int:
        return max(drops for drops, _ in self.points if self.cliff is None or drops < self.cliff)


def trend(
    dense: Any, plan: Plan, ids: Tensor, tick: Callable[[int, int], None] | None = None, scored: Tensor | None = None
) -> Trend | None:
    """How log-perplexity rises as the plan's layers go, a quarter at a time, on the first windows of ids [N, T].

    None for a plan of fewer than 4 drops, and for one with repairs, whose first drops alone say little.
    Time: five forward passes over two windows.
    """
    layers = plan.layers
    if len(layers) < AT_LEAST or plan.repairs:
        return None
    few, points = ids[:WINDOWS], []
    counts = None if scored is None else scored[:WINDOWS]
    for count in quarters(len(layers)):
        points.append((count, perplexity(without(dense, plan.outline, layers[:count]), few, counts).nll))
        if tick:
            tick(len(points), len(points) * few.numel())
    return Trend(points=points, drops=len(layers), cliff=cliff(points))


def quarters(total: int) -> Sequence[int]:
    """0, a quarter, half, three quarters and all of a number of drops, rounded."""
    return [round(total * part / 4) for part in range(5)]
