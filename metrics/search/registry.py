"""Metrics and selections by name.  A new one is one function and one entry here.  Light: no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dropformer.prune.registry import Registry, imported

if TYPE_CHECKING:
    from dropformer.metrics.blockwise.layer_metrics import Metric

_METRICS = "dropformer.metrics.blockwise.layer_metrics"
_SEARCH = "dropformer.metrics.search.selections"


@dataclass(frozen=True)
class MetricEntry:
    """A metric: one score per layer, the highest are dropped first; a `layer_metrics.Metric` or "module:name" of one.

    `slow`: it runs the model for each layer, so it uses the few windows of a search.
    """

    summary: str
    score: str | Callable
    slow: bool = False

    def method(self) -> Metric:
        return imported(self.score)


@dataclass(frozen=True)
class SelectionEntry:
    """A selection: `pick(improver, free, count, dropped)` returns `count` of the free layers on top of those dropped
    already; None takes the first of one ranking.  `measures`: it measures candidates on separate windows."""

    summary: str
    pick: str | Callable | None = None
    measures: bool = False

    def method(self) -> Any:
        return imported(self.pick)


METRICS: Registry[MetricEntry] = Registry(
    "--metric",
    {
        "similarity": MetricEntry("cos(x, y), arXiv 2406.15786", f"{_METRICS}:mean_similarity"),
        "angular": MetricEntry("1 - arccos(cos(x, y)) / pi, arXiv 2403.17887", f"{_METRICS}:mean_angular"),
        "relative-magnitude": MetricEntry("-|y - x| / |y|, arXiv 2312.09299", f"{_METRICS}:mean_relative_magnitude"),
        "loo-kl": MetricEntry("-KL(dense || without the layer)", f"{_METRICS}:leave_one_out_kl", True),
        "loo-perplexity": MetricEntry(
            "-log perplexity without the layer, arXiv 2402.09025", f"{_METRICS}:leave_one_out_perplexity", True
        ),
    },
)

SELECTIONS: Registry[SelectionEntry] = Registry(
    "--select",
    {
        "one-shot": SelectionEntry("one ranking of the dense model"),
        "iterative": SelectionEntry("the ranking measured again after each drop", f"{_SEARCH}:pick_iterative"),
        "greedy": SelectionEntry("least KL to the dense model, layer after layer", f"{_SEARCH}:pick_greedy", True),
    },
)
