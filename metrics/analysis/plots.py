"""Pictures of the scores."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from dropformer.metrics.analysis.scores import Scores
from dropformer.prune.architecture import KIND_NAMES, Layer

COLORS = {"attn": "#1f77b4", "mlp": "#d95f02", "block": "#555555", "cross": "#7570b3"}

SMALLEST = 1e-5  # a distance below this is rounding


def similarity_by_depth(scores: Scores, path: Path, dropped: Collection[Layer] = ()) -> Path:
    """Draw 1 - similarity against depth on a logarithmic axis, a line per kind, with the dropped layers marked.

    Most layers are within a few percent of 1, where only the distance from 1 tells them apart.  The band is two
    standard errors.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    similarity, stderr = scores.similarity(), scores.stderr()
    for kind, stack in dict.fromkeys((layer.kind, layer.stack) for layer in similarity):
        layers = sorted(layer for layer in similarity if (layer.kind, layer.stack) == (kind, stack))
        depth, values = [layer.index for layer in layers], [_importance(similarity[layer]) for layer in layers]
        label = f"{stack} {KIND_NAMES[kind]}".strip()
        axes.plot(depth, values, marker="o", markersize=3.5, color=COLORS[kind], label=label)
        errors = [2 * (stderr[layer] or 0) for layer in layers]
        low = [max(SMALLEST, v - e) for v, e in zip(values, errors, strict=True)]
        high = [v + e for v, e in zip(values, errors, strict=True)]
        axes.fill_between(depth, low, high, color=COLORS[kind], alpha=0.15, linewidth=0)
        marked = [layer for layer in layers if layer in dropped]
        axes.plot(
            [layer.index for layer in marked], [_importance(similarity[layer]) for layer in marked],
            "x", color=COLORS[kind], markersize=10, markeredgewidth=2,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_title(f"{scores.model.name}: the lower, the more redundant")
    over_counts(axes, "block", "1 - cosine similarity of the residual stream\nbefore and after the layer")
    axes.legend(frameon=False)
    return save(figure, path)


def over_counts(axes: Any, counted: str, value: str) -> None:
    """Label the axes of lines over whole numbers, with a grid."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(counted)
    axes.set_ylabel(value)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)


def save(figure: Any, path: Path) -> Path:
    """Write a picture in which names are printed as they are: `$` begins no formula, but in the numbers of an axis."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    numbers = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if not isinstance(axis.get_major_formatter(), (FixedFormatter, FuncFormatter)):
            numbers |= {text for text in axis.findobj(Text) if text is not axis.label}
    for text in figure.findobj(Text):
        if text not in numbers:
            text.set_parse_math(False)
    figure.savefig(path, dpi=150)
    return path


def _importance(similarity: float) -> float:
    return max(SMALLEST, 1 - similarity)
