"""A plot of speed-up over the number of drafted tokens: expected, bound and measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from dropformer.metrics.analysis.plots import over_counts, save
from dropformer.metrics.draft.formula import speedup

PNG = "draft.png"


def draw_speedup(
    expected: Mapping[int, float], cost: float, path: Path, measured: tuple[int, float] | None = None
) -> Path:
    """Draw the plot.  The bound: every token is accepted and verifying costs one step."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    tokens = list(expected)
    axes.plot(tokens, [speedup(1.0, g, cost) for g in tokens], ":", color="grey", label="bound")
    axes.plot(tokens, list(expected.values()), "o-", color="#1f77b4", markersize=4, label="expected")
    best = max(tokens, key=lambda g: expected[g])
    axes.plot([best], [expected[best]], "D", color="#1f77b4", markersize=8)
    if measured:
        axes.plot([measured[0]], [measured[1]], "s", color="#d95f02", markersize=8, label="measured")
    axes.axhline(1, color="black", linewidth=0.8)
    over_counts(axes, "drafted tokens", "tokens per second over dense")
    axes.legend(frameon=False)
    return save(figure, path)
