"""Plots of a comparison: layers by checkpoints, redundancy over training, pairwise agreement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from dropformer.eval.compare.comparison import Comparison, Matrix, kind_title
from dropformer.metrics.analysis.plots import COLORS, save

SMALLEST = 1e-5  # an importance below this is rounding error
LABELS = 16  # most tick labels per axis
PAGE = 9.4  # page width in inches beside the color bar
NUMBERS = 12  # most checkpoints with values written into the cells
WIDE_RANGE = 30  # ratio of largest to smallest step above which the axis is logarithmic


def heatmaps(found: Comparison, path: Path) -> Path:
    """Importance of each layer in each checkpoint, one panel per kind; a dot marks the drop set."""
    kinds, count = found.kinds, len(found.checkpoints)
    blocks = max(len(found.checkpoints[0].similarity[kind]) for kind in kinds)
    wide, high = np.clip(0.3 * count + 1.0, 2.3, PAGE / len(kinds)), np.clip(0.17 * blocks + 1.3, 3.0, 10.0)
    figure = Figure(figsize=(wide * len(kinds) + 0.8, high), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    values = {kind: _importance(found, kind) for kind in kinds}
    every = np.concatenate([v.compressed() for v in values.values()])
    norm = LogNorm(every.min(), max(every.max(), every.min() * 1.01))
    for axes, kind in zip(panels, kinds, strict=True):
        image = axes.imshow(values[kind], norm=norm, cmap="viridis_r", aspect="auto", interpolation="nearest")
        axes.set_facecolor("#d9d9d9")
        axes.set_title(kind_title(kind), fontsize=10)
        _checkpoint_axis(axes, found)
        _mark_chosen(axes, found, kind)
        axes.yaxis.set_major_locator(FixedLocator(_thinned(blocks)))
    panels[0].set_ylabel("block")
    bar = figure.colorbar(
        image, ax=list(panels), label="importance, 1 - similarity\n(the brighter, the more redundant)"
    )
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return save(figure, path)


def over_training(found: Comparison, path: Path) -> Path:
    """Left: mean similarity per layer kind.  Right: agreement of each checkpoint with the last one."""
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = found.steps or list(range(len(found.checkpoints)))
    line = "-" if found.steps else "none"  # variants have no order
    for kind in found.kinds:
        style = {"color": COLORS[kind.rpartition(".")[2]], "marker": "o", "markersize": 3.5, "label": kind_title(kind)}
        style["linestyle"] = line
        left.plot(places, _numbers([c.mean[kind] for c in found.checkpoints]), **style)
        right.plot(places, _numbers(found.spearman_to_last(kind)), **style)
    if found.overlap:
        shared = [row[-1] for row in found.overlap]
        right.plot(
            places,
            shared,
            color="k",
            linestyle="--" if found.steps else "none",
            marker="s",
            markersize=3.5,
            label=f"overlap of {found.spec}",
        )
    if found.overlap_by_chance:
        right.axhline(found.overlap_by_chance, color="k", linewidth=0.8, linestyle=":", label="overlap by chance")
    if found.known_from and found.known_from.index:
        right.axvline(places[found.known_from.index], color="#2ca02c", linewidth=1, label=f"{found.spec} known")
    left.set_title("redundancy: mean similarity", fontsize=10)
    right.set_title("agreement with the last checkpoint", fontsize=10)
    for axes, what in ((left, "cosine similarity"), (right, "Spearman correlation, Jaccard overlap")):
        axes.set_ylabel(what)
        axes.grid(alpha=0.25)
        _step_axis(axes, found)
    right.legend(frameon=False, fontsize=8)
    left.legend(frameon=False, fontsize=8)
    return save(figure, path)


def agreement(found: Comparison, path: Path) -> Path:
    """Pairwise: rank correlation of similarity per layer kind, overlap of the drop sets."""
    parts: list[tuple[str, Matrix, float]] = [(kind_title(k), found.spearman[k], -1.0) for k in found.kinds]
    if found.overlap:
        parts.append((f"overlap of {found.spec}", [list(row) for row in found.overlap], 0.0))
    side = float(np.clip(0.36 * len(found.checkpoints) + 1.2, 2.8, 5.0))
    columns = min(2, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(side * columns * 1.1, side * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, matrix, low) in zip(panels, parts, strict=False):
        values = np.array([_numbers(row) for row in matrix])
        image = axes.imshow(values, vmin=low, vmax=1, cmap="RdBu" if low < 0 else "Blues")
        axes.set_facecolor("#d9d9d9")
        axes.set_title(title, fontsize=10)
        _checkpoint_axis(axes, found)
        axes.set_xlabel("")
        axes.yaxis.set_major_locator(FixedLocator(_thinned(len(values))))
        axes.set_yticklabels([_names(found)[i] for i in _thinned(len(values))], fontsize=7)
        if len(values) <= NUMBERS:
            _write_values(axes, values)
        else:
            figure.colorbar(image, ax=axes, fraction=0.046)
    for axes in panels[len(parts) :]:
        axes.remove()
    return save(figure, path)


def _importance(found: Comparison, kind: str) -> np.ma.MaskedArray:
    """[blocks, checkpoints], masked where a checkpoint has no such layer."""
    rows = np.array([_numbers(c.similarity[kind]) for c in found.checkpoints]).T
    return np.ma.masked_invalid(np.maximum(1 - rows, SMALLEST))


def _mark_chosen(axes: Any, found: Comparison, kind: str) -> None:
    marks = [
        (column, int(name.rpartition(":")[2]))
        for column, checkpoint in enumerate(found.checkpoints)
        for name in checkpoint.chosen or []
        if name.rpartition(":")[0] == kind
    ]
    if marks:
        size = np.clip(200 / len(found.checkpoints), 5, 14)
        axes.scatter(*zip(*marks, strict=True), s=size, color="white", edgecolors="black", linewidths=0.6)


def _write_values(axes: Any, values: np.ndarray) -> None:
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if abs(value) > 0.7 else "black"
            axes.text(j, i, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=6, color=color)


def _checkpoint_axis(axes: Any, found: Comparison) -> None:
    shown = _thinned(len(found.checkpoints))
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.set_xticklabels([_names(found)[i] for i in shown], rotation=45, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_xlabel("training step" if found.steps else "")


def _step_axis(axes: Any, found: Comparison) -> None:
    if not found.steps:
        _checkpoint_axis(axes, found)
        return
    axes.set_xlabel("training step")
    positive = sorted(step for step in found.steps if step)
    if positive and positive[-1] >= WIDE_RANGE * positive[0]:
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
        axes.set_xlim(-0.2 * positive[0] if 0 in found.steps else 0.8 * positive[0], 1.3 * positive[-1])
        shown = [sorted(set(found.steps))[i] for i in _thinned(len(set(found.steps)), 10)]
        axes.xaxis.set_major_locator(FixedLocator(shown))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([_short(step) for step in shown], fontsize=8)


def _names(found: Comparison) -> list[str]:
    return [_short(step) for step in found.steps] if found.steps else [c.label for c in found.checkpoints]


def _short(step: int) -> str:
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if step >= unit and step % (unit // 10) == 0:
            return f"{step / unit:g}{name}"
    return str(step)


def _thinned(count: int, most: int = LABELS) -> list[int]:
    """At most `most` evenly spaced indices below `count`, the last included."""
    return [count - 1 - i for i in range(0, count, -(-count // most))][::-1]


def _numbers(values: Any) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)
