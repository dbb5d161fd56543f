"""Where the loss of quality leaves its trend: of a curve of any number of drops, and of a plan's first drops alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from dropformer.eval.quality.perplexity import SideBySide, token_losses
from dropformer.metrics.calibration.windows import Windows
from dropformer.prune.artifact import FrozenRecord
from dropformer.prune.plan import Plan
from dropformer.prune.surgery.views import without

STEEPER = 3.0  # times the median slope so far
AT_LEAST = 0.05  # nats of log-perplexity or KL; below it no rise is called a cliff
CLEAR = 2.0  # standard errors by which a rise must exceed the trend
FEWEST_DROPS = 4  # fewer have no trend to leave
WINDOWS, EVERY = 4, 4  # a trend is measured on so many windows, on every fourth of their tokens

Damage = float | Sequence[float]


def cliff(points: Iterable[tuple[int, Damage]]) -> int | None:
    """The first number of drops that lies beyond a cliff, or None.

    points: (layers dropped, damage), in any order; damage grows as quality falls: log-perplexity or KL in nats, one
    figure, or one for each window, the same windows at every point.  A point lies beyond a cliff when the rise from
    the point before it is at least `AT_LEAST`, and exceeds `STEEPER` times the median slope of all earlier steps by
    more than two standard errors of the rise, window by window.  Slopes are per layer, so unequal steps compare; a
    fall counts as no slope.  The first step has no trend to leave: it is never a cliff, and neither is a rise that one
    window shows, whose error is not known.
    """
    ordered = [(drops, _each(damage)) for drops, damage in sorted(points, key=lambda point: point[0])]
    slopes: list[float] = []
    for (drops_before, before), (drops, damage) in pairwise(ordered):
        rises = [after - earlier for earlier, after in zip(before, damage, strict=True)]
        rise, step = statistics.fmean(rises), max(1, drops - drops_before)
        allowed = STEEPER * statistics.median(slopes) * step if slopes else math.inf
        if rise >= AT_LEAST and rise - allowed > CLEAR * _stderr(rises):
            return drops
        slopes.append(max(0.0, rise) / step)
    return None


def mark_cliff(axes: Any, drops: int | None, color: str = "#555555") -> None:
    """A dotted line at a cliff, if there is one."""
    if drops is not None:
        axes.axvline(drops, color=color, linestyle=":", linewidth=1.5)
        place = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "top", "rotation": 90, "fontsize": 8}
        axes.annotate(f"beyond a cliff at {drops}", (drops, 0.97), color=color, **place)


def _each(damage: Damage) -> list[float]:
    """The damage of each window; a figure without windows is taken as exact."""
    return [damage, damage] if isinstance(damage, (int, float)) else list(damage)


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


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


def trend(dense: Any, plan: Plan, data: Windows, both: SideBySide) -> Trend | None:
    """How log-perplexity rises over the plan's drops, a quarter of them at a time, on the first windows.

    both: what the dense model and the whole plan gave on them, the first and the last point.  None for a plan of
    fewer than 4 drops, and for one with repairs, maps or windows, whose first drops alone say little.  Time: three
    forward passes over four windows, with a quarter of their logits.
    """
    layers = plan.layers
    if len(layers) < FEWEST_DROPS or plan.repairs or plan.maps or plan.rungs:
        return None
    first, *between, last = quarters(len(layers))
    scored = None if data.partly_scored is None else data.partly_scored[:WINDOWS]
    known = [_means([each[::EVERY] for each in losses[:WINDOWS]]) for losses in both.losses]
    points = [(first, known[0])]
    for count in between:
        losses = token_losses(without(dense, plan.outline, layers[:count]), data.ids[:WINDOWS], EVERY, scored)
        points.append((count, _means(losses)))
    points.append((last, known[1]))
    means = [(count, statistics.fmean(each)) for count, each in points]
    return Trend(points=means, drops=len(layers), cliff=cliff(points))


def _means(losses: Sequence[Tensor]) -> list[float]:
    return [float(each.mean()) for each in losses]


def quarters(total: int) -> Sequence[int]:
    """0, a quarter, half, three quarters and all of a number of drops, rounded."""
    return [round(total * part / 4) for part in range(5)]
