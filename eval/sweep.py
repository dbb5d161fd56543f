"""`prune sweep`: quality and size for every number of dropped layers, and where the curve breaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from dropformer.eval.cliff import cliff
from dropformer.eval.perplexity import side_by_side
from dropformer.eval.work import work_of
from dropformer.prune.architecture import KIND_NAMES
from dropformer.prune.artifact import Artifact, ModelRef, Part


class Point(Part):
    """One number of drops: its cost in perplexity and KL, and the ratios that its work allows."""

    drops: int
    layers: list[str]
    perplexity: float
    kl: float
    kl_stderr: float
    parameters: int
    decode_bound: float


class Sweep(Artifact):
    """sweep.json: the curve, and the first number of drops beyond a cliff."""

    kind: ClassVar[str] = "sweep"

    model: ModelRef
    of: str
    text: dict[str, Any]
    points: list[Point]
    cliff: int | None


def point(dense: Any, pruned: Any, layers: Sequence[Any], ids: Any, context: int = 2048) -> Point:
    """Measure one pruned model against the dense one on windows [N, T]."""
    both = side_by_side(dense, pruned, ids)
    before, after = work_of(dense), work_of(pruned)
    return Point(
        drops=len(layers),
        layers=[str(layer) for layer in layers],
        perplexity=both.pruned.value,
        kl=both.divergence.value,
        kl_stderr=both.divergence.stderr,
        parameters=sum(p.numel() for p in pruned.parameters()),
        decode_bound=before.decode_elements(1, context) / after.decode_elements(1, context),
    )


def find_cliff(points: Sequence[Point]) -> int | None:
    """The first number of drops after which log-perplexity leaves its trend."""
    return cliff((p.drops, math.log(p.perplexity)) for p in points)


def draw(sweep: Sweep, path: Path) -> Path:
    """Perplexity over dense and the decode ratio that the work allows, by number of drops; the cliff marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    left = figure.add_subplot()
    drops = [p.drops for p in sweep.points]
    base = sweep.points[0].perplexity
    left.plot(drops, [p.perplexity / base for p in sweep.points], "o-", color="#b2182b", label="perplexity over dense")
    left.set_xlabel(f"dropped {KIND_NAMES.get(sweep.of, sweep.of)} layers")
    left.set_ylabel("perplexity over dense", color="#b2182b")
    right = left.twinx()
    right.plot(drops, [p.decode_bound for p in sweep.points], "s--", color="#2166ac")
    right.set_ylabel("decode speed-up that the work allows", color="#2166ac")
    if sweep.cliff is not None:
        left.axvline(sweep.cliff, color="#555555", linestyle=":", linewidth=1.5)
        left.annotate(f"cliff at {sweep.cliff}", (sweep.cliff, left.get_ylim()[1]), ha="right", va="top", rotation=90)
    left.set_title(f"{sweep.model.name}: what each further drop costs")
    left.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
    return path
