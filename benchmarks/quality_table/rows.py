"""The methods and drops that `quality.py` compares, and a row of its results."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from dropformer.metrics.search.strategy import Strategy, quality

DROPS = (
    *("attn:12", "attn:8", "attn:6", "attn:4", "attn:2", "block:7", "block:4", "block:2"),
    *("mlp:4", "mlp:2", "joint:12", "joint:8"),
)
METHODS: dict[str, Strategy] = {
    "similarity": quality("paper"),
    "iterative": quality(select="iterative"),
    "greedy": quality(select="greedy"),
    "refit": quality(repair="refit"),
    "greedy then refit": replace(quality("best", repair="refit"), aware=False),
    "greedy with refit": quality("best", repair="refit"),
    "refined": quality("best", repair="refit", refine=1),
    "best": quality("best"),
    "healed": quality("healed"),
    "distill": quality(repair="distill"),
    "best then lora": quality("best", repair="refit,refit-all,lora"),
    "best then distill": quality("best", repair="refit,refit-all,distill"),
    "greedy then linear": replace(quality("linear"), aware=False),
    "linear": quality("linear"),
    "linear then refit-all": quality("linear", repair="linear,refit,refit-all"),
    "linear+lora": quality("linear", repair="linear,refit,lora"),
    "angular": quality(metric="angular"),
    "relative-magnitude": quality(metric="relative-magnitude"),
    "loo-kl": quality(metric="loo-kl"),
    "loo-perplexity": quality(metric="loo-perplexity"),
    "refit-all": quality(repair="refit-all"),
    "lora": quality(repair="lora"),
}


@dataclass(frozen=True)
class Row:
    """One method on one drop.  Ratios are perplexity over dense perplexity; stderr that of the geometric mean.

    Seconds are of CPU time, passes forward passes over the calibration, those of choosing and repairing that an
    earlier row of the same run has not spent.  Peak: the most memory of the process so far, with
    weights and validation.
    """

    method: str
    drop: str
    layers: list[str]
    ratios: dict[str, float]
    mean: float
    stderr: float
    kl: float
    seconds: float
    gates: list[str]
    passes: float = 0.0
    peak_gib: float = 0.0


def rows_in(file: Path | None) -> list[Row]:
    """Rows that an earlier run wrote, one JSON object a line."""
    lines = file.read_text(encoding="utf-8").splitlines() if file and file.is_file() else []
    return [Row(**json.loads(line)) for line in lines]
