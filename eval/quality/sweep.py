"""`prune sweep`: quality and size for every number of dropped layers, and where the curve breaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from dropformer.eval.cost.counting import cost_of
from dropformer.eval.cost.speed import Speed, bounds, measure
from dropformer.eval.cost.timing import Setting
from dropformer.eval.quality.cliff import cliff, mark_cliff
from dropformer.eval.quality.perplexity import side_by_side
from dropformer.metrics.analysis.plots import over_counts, save
from dropformer.prune.architecture import KIND_NAMES
from dropformer.prune.artifact import Artifact, FrozenRecord, ModelRef

AT = Setting(prompt=2048, new=1)
"""Where the bound is counted if nothing is measured."""

REPEATS = 3  # of measured speed
RED, BLUE = "#b2182b", "#2166ac"


class Point(FrozenRecord):
    """One number of drops: its cost in perplexity and KL, and the speed-up of decoding that its work allows.

    prefill, decode: measured ratios to dense where speed was asked for, as (lower quartile, median, upper).
    """

    drops: int
    layers: list[str]
    perplexity: float
    kl: float
    kl_stderr: float | None  # None: one window
    window_nll: list[float] = []  # nats per token of each window, which say how sure a rise is
    parameters: int
    decode_bound: float
    prefill: tuple[float, float, float] | None = None
    decode: tuple[float, float, float] | None = None


class Sweep(Artifact):
    """sweep.json: the curve, and the first number of drops beyond a cliff.

    setting: what speed was measured at, or, where it was not, what the bound is counted at.
    """

    kind: ClassVar[str] = "sweep"

    model: ModelRef
    of: str
    text: dict[str, Any]
    setting: str = ""
    points: list[Point]
    cliff: int | None


def point(dense: Any, pruned: Any, layers: Sequence[Any], ids: Any, setting: Setting = AT, scored: Any = None) -> Point:
    """Measure one pruned model's quality against the dense one on windows [N, T], at scored tokens (None: all)."""
    both = side_by_side(dense, pruned, ids, scored)
    return Point(
        drops=len(layers),
        layers=[str(layer) for layer in layers],
        perplexity=both.pruned.value,
        kl=both.divergence.value,
        kl_stderr=both.divergence.stderr,
        window_nll=[float(each.mean()) for each in both.losses[1]],
        parameters=sum(p.numel() for p in pruned.parameters()),
        decode_bound=bounds(cost_of(dense), cost_of(pruned), setting)[1],
    )


def with_speed(points: Sequence[Point], models: Sequence[Any], setting: Setting) -> list[Point]:
    """The points with measured speeds, all models interleaved in one run; the first is the dense one."""
    named = {str(at.drops): model for at, model in zip(points, models, strict=True)}
    table = measure(named, [setting], REPEATS)
    return [at.model_copy(update=_ratios(table.row(str(at.drops)))) for at in points]


def _ratios(row: Speed) -> dict[str, Any]:
    found = {"prefill": row.prefill_ratio, "decode": row.decode_ratio}
    return {name: (ratio.low, ratio.median, ratio.high) for name, ratio in found.items()}


def table(sweep: Sweep) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows for the terminal; a column of measured speed where it was measured."""
    head, base = ["drops", "perplexity", "over dense", "KL, nats", "decode allowed"], sweep.points[0].perplexity
    rows: list[tuple[str, ...]] = []
    for p in sweep.points:
        cells = (str(p.drops), f"{p.perplexity:.2f}", f"{p.perplexity / base:.3f}x", f"{p.kl:.4f}")
        measured = (f"{p.decode[1]:.2f}x",) if p.decode else ()
        rows.append((*cells, f"{p.decode_bound:.2f}x", *measured))
    return [*head, "decode measured"] if sweep.points[0].decode else head, rows


def find_cliff(points: Sequence[Point]) -> int | None:
    """The first number of drops after which log-perplexity leaves its trend."""
    return cliff((p.drops, p.window_nll or math.log(p.perplexity)) for p in points)


def draw(sweep: Sweep, path: Path) -> Path:
    """Perplexity over dense and the speed-up of decoding, by number of drops; the cliff marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    left = figure.add_subplot()
    drops, base = [p.drops for p in sweep.points], sweep.points[0].perplexity
    ratios = [p.perplexity / base for p in sweep.points]
    lines = left.plot(drops, ratios, "o-", color=RED, label="perplexity over dense")
    kind, _, window = sweep.of.partition("@")
    counted = f"dropped {KIND_NAMES.get(kind, kind)} layers"
    over_counts(left, f"attention layers with a window of {window}" if window else counted, "perplexity over dense")
    left.yaxis.label.set_color(RED)
    right = left.twinx()
    lines += right.plot(drops, [p.decode_bound for p in sweep.points], "--", color=BLUE, label="decode, as work allows")
    lines += _measured(right, sweep)
    right.set_ylabel("decode, times as fast as dense", color=BLUE)
    mark_cliff(left, sweep.cliff)
    left.set_title(f"{sweep.model.name}: what each further drop costs and saves")
    labels = [str(line.get_label()) for line in lines]
    figure.legend(lines, labels, frameon=False, loc="outside lower center", ncols=len(lines), fontsize=8)
    return save(figure, path)


def _measured(axes: Any, sweep: Sweep) -> list[Any]:
    """The line of measured speeds, with a band between the quartiles."""
    found = [(p.drops, *p.decode) for p in sweep.points if p.decode]
    if not found:
        return []
    drops, low, median, high = zip(*found, strict=True)
    axes.fill_between(drops, low, high, color=BLUE, alpha=0.15, linewidth=0)
    return list(axes.plot(drops, median, "s-", color=BLUE, markersize=4, label=f"decode, measured ({sweep.setting})"))
