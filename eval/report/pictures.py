"""Plots of an evaluation: quality against drop, score retained per test, speed against its bound."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dropformer.eval.quality.cliff import Trend, mark_cliff
from dropformer.eval.report.evaluation import Evaluation, ModelResult
from dropformer.eval.report.tables import setting_name
from dropformer.metrics.analysis.plots import over_counts, save

COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e")
CLIFF = "#b2182b"


def quality_by_drop(evaluation: Evaluation, path: Path) -> Path | None:
    """Perplexity over dense against dropped layers: each plan's first drops alone, and the models as they are.

    None, and no picture, where no model's drops and perplexity are known.
    """
    dense, *pruned = evaluation.models
    known = [model for model in pruned if model.drops and model.perplexity]
    if not known or not dense.perplexity:
        return None
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for model, color in zip(known, cycle(COLORS), strict=False):
        if model.trend:
            drops, ratios = zip(*_over_dense(model.trend), strict=True)
            axes.plot(drops, ratios, "o--", color=color, markersize=4, linewidth=1.2, alpha=0.8)
            mark_cliff(axes, model.trend.cliff, CLIFF)
        assert model.perplexity
        ratio = model.perplexity["value"] / dense.perplexity["value"]
        axes.plot([len(model.drops)], [ratio], "D", color=color, markersize=8, label=model.name)
    axes.plot([0], [1], "s", color="black", markersize=6, label=dense.name)
    over_counts(axes, "layers dropped", "perplexity over dense")
    axes.legend(frameon=False)
    return save(figure, path)


def kept_by_test(evaluation: Evaluation, path: Path) -> Path | None:
    """Share of the dense model's score retained per task and probe, with its standard error."""
    dense, *pruned = evaluation.models
    rows = {model.name: dict(_kept(dense, model)) for model in pruned}
    names = list(dict.fromkeys(name for kept in rows.values() for name in kept))
    if not names:
        return None
    figure = Figure(figsize=(7.5, 1.1 + 0.45 * len(names) + 0.15 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for i, ((model, kept), color) in enumerate(zip(rows.items(), cycle(COLORS), strict=False)):
        shift = 0.14 * (i - (len(rows) - 1) / 2)
        places = [names.index(name) + shift for name in kept]
        values, errors = zip(*kept.values(), strict=True) if kept else ((), ())
        axes.errorbar(values, places, xerr=errors, fmt="o", color=color, capsize=3, label=model)
    axes.set_xlim(left=0)
    _relative_to_dense(axes, names, "share of the dense model's score that is kept, ± one standard error")
    _legend_below(figure, len(rows))
    return save(figure, path)


def speed_against_bound(evaluation: Evaluation, path: Path) -> Path | None:
    """Per setting the measured speed over dense, median and quartiles, beside its upper bound."""
    dense, *pruned = evaluation.models
    if not dense.speed or not pruned:
        return None
    names = [f"{part}, {setting_name(row)}" for row in dense.speed for part in ("prefill", "decode")]
    figure = Figure(figsize=(7.5, 1.2 + 0.42 * len(names) + 0.15 * len(pruned)), layout="constrained")
    axes = figure.add_subplot()
    for i, (model, color) in enumerate(zip(pruned, cycle(COLORS), strict=False)):
        shift = 0.16 * (i - (len(pruned) - 1) / 2)
        ratios = [(row[f"{part}_ratio"], row[f"bound_{part}"]) for row in model.speed for part in ("prefill", "decode")]
        places = [place + shift for place in range(len(ratios))]
        medians = [ratio["median"] for ratio, _ in ratios]
        spread = [[r["median"] - r["low"] for r, _ in ratios], [r["high"] - r["median"] for r, _ in ratios]]
        axes.errorbar(medians, places, xerr=spread, fmt="o", color=color, capsize=3, label=f"{model.name}, measured")
        style: dict[str, Any] = {"color": color, "markersize": 16, "markeredgewidth": 2.5}
        axes.plot([bound for _, bound in ratios], places, "|", label=f"{model.name}, upper bound", **style)
    _relative_to_dense(axes, names, "times as fast as dense")
    _legend_below(figure, len(pruned))
    return save(figure, path)


def _relative_to_dense(axes: Any, names: Sequence[str], label: str) -> None:
    """One row per name, from the top, along an axis on which 1 is the dense model."""
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(alpha=0.25, axis="x")


def _over_dense(trend: Trend) -> list[tuple[int, float]]:
    return [(drops, math.exp(nll - trend.points[0][1])) for drops, nll in trend.points]


def _kept(dense: ModelResult, model: ModelResult) -> Iterator[tuple[str, tuple[float, float]]]:
    for name in model.tasks.named if model.tasks else ():
        paired = model.paired.get(name)
        if paired and paired.retained is not None:
            yield name, (paired.retained, paired.retained_stderr or 0.0)
    probes = {probe["name"]: probe for probe in model.probes}
    for before in dense.probes:
        if before["accuracy"] and (after := probes.get(before["name"])):
            yield f"probe: {before['name']}", _share(before, after)


def _share(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, float]:
    """after / before, and its standard error assuming independence."""
    ratio = after["accuracy"] / before["accuracy"]
    relative = [p["stderr"] / p["accuracy"] if p["accuracy"] else 0.0 for p in (before, after)]
    return ratio, ratio * math.hypot(*relative)


def _legend_below(figure: Figure, columns: int) -> None:
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=columns)
