"""Where a curve of damage against dropped layers leaves its trend."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from itertools import pairwise

STEEPER = 3.0  # times the median slope so far
AT_LEAST = 0.05  # nats of log-perplexity or KL; below it no rise is called a cliff


def cliff(points: Iterable[tuple[int, float]], *, steeper: float = STEEPER, at_least: float = AT_LEAST) -> int | None:
    """The first number of drops that lies beyond a cliff, or None.

    points: (layers dropped, damage), in any order; damage grows as quality falls: log-perplexity or KL
    in nats (or an error rate, with its own `at_least`).  A point lies beyond a cliff when the rise from
    the point before it is at least `at_least` and its slope more than `steeper` times the median slope
    of all earlier steps.  Slopes are per layer, so unequal steps compare; a fall counts as no slope.
    The first step has no trend to leave: it is never a cliff.
    """
    ordered = sorted(points)
    slopes: list[float] = []
    for (drops_before, before), (drops, damage) in pairwise(ordered):
        rise = damage - before
        slope = max(0.0, rise) / max(1, drops - drops_before)
        if slopes and rise >= at_least and slope > steeper * statistics.median(slopes):
            return drops
        slopes.append(slope)
    return None
