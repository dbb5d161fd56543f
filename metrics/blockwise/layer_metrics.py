"""Scores of a layer's redundancy: one for each layer, the highest dropped first (`search.registry.METRICS`).

    similarity          cos(x, y)                           arXiv 2406.15786, eq. 1-4
    angular             1 - arccos(cos(x, y)) / pi          arXiv 2403.17887
    relative-magnitude  -|y - x| / |y|                      arXiv 2312.09299
    loo-kl              -KL(dense || without the layer)     ground truth for one dropped layer
    loo-perplexity      -log perplexity without the layer   arXiv 2402.09025 (SLEB), for one layer

x and y are the residual stream before and after the layer, at scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dropformer.metrics.analysis.similarity import cosine, distance, norm
from dropformer.metrics.blockwise.divergence import DenseReference, dropped_modules
from dropformer.metrics.blockwise.residuals import residual_pairs
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import variant
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.loading.parts import replaced


@dataclass(frozen=True)
class MetricContext:
    """What a metric works on: a model taken apart, its anatomy, and which positions count (None: all)."""

    runner: BlockRunner
    architecture: Architecture
    scored: list[Tensor | None]
    stride: int = 4  # log-probabilities are compared at every 4th position

    def layers(self) -> list[Layer]:
        return self.architecture.layers()

    def weight(self, batch: int) -> Tensor:
        """1 at scored positions, else 0, [B, T] float64."""
        start, scored = self.runner.start(batch), self.scored[batch]
        if scored is None:
            return torch.ones(start.shape[:2], dtype=torch.float64, device=start.device)
        return scored.to(start.device, torch.float64)


PairScore = Callable[[Tensor, Tensor], Tensor]
Metric = Callable[["MetricContext"], dict[Layer, float]]


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """cos(x, y) per token.  [..., D] -> [...]."""
    return cosine(distance(x, y), norm(x), norm(y))


def angular(x: Tensor, y: Tensor) -> Tensor:
    """1 minus the angle between x and y in half turns: 1 where they agree, 0 where they are opposed."""
    return 1 - torch.arccos(similarity(x, y).clamp(-1, 1)) / math.pi


def relative_magnitude(x: Tensor, y: Tensor) -> Tensor:
    """-|y - x| / |y| per token: how little of the stream after the layer is the layer's."""
    return -norm((y - x).float()) / norm(y.float()).clamp_min(torch.finfo(torch.float32).tiny)


def mean_over_tokens(score: PairScore) -> Metric:
    """A metric from a number per token.  One forward pass; memory: one block's streams and those that enter it."""

    def metric(bench: MetricContext) -> dict[Layer, float]:
        sums: dict[Layer, Tensor] = {}
        with torch.inference_mode():
            weights = [bench.weight(batch) for batch in range(len(bench.runner))]
            for batch, layer, x, y in residual_pairs(bench.runner):
                found = (score(x, y.to(x.device)).double() * weights[batch].to(x.device)).sum()
                sums[layer] = sums[layer].to(found.device) + found if layer in sums else found
        counted = float(sum(w.sum() for w in weights))
        return {layer: float(total) / counted for layer, total in sums.items()}

    return metric


def leave_one_out_kl(bench: MetricContext) -> dict[Layer, float]:
    """-KL(dense || without the layer), for each layer.

    Time: half a forward pass for each layer, as everything before the dropped one is reused.  Memory: `Dense`.
    """
    return {layer: -kl for layer, (kl, _) in leave_one_out(bench, bench.layers()).items()}


def leave_one_out_perplexity(bench: MetricContext) -> dict[Layer, float]:
    """-log perplexity without the layer.  Time and memory as for `leave_one_out_kl`."""
    return {layer: -nll for layer, (_, nll) in leave_one_out(bench, bench.layers()).items()}


def leave_one_out(
    bench: MetricContext, layers: Iterable[Layer], dense: DenseReference | None = None
) -> dict[Layer, tuple[float, float]]:
    """(KL, negative log-likelihood) with each of these layers dropped by itself."""
    dense = dense or DenseReference(bench.runner, bench.stride, bench.scored)
    wanted = list(layers)
    damages = dense.compare_each([variant(bench.runner.model, bench.architecture, [layer]) for layer in wanted])
    return {layer: (d.mean_kl, float(d.nll.mean())) for layer, d in zip(wanted, damages, strict=True)}


mean_similarity = mean_over_tokens(similarity)
mean_angular = mean_over_tokens(angular)
mean_relative_magnitude = mean_over_tokens(relative_magnitude)


@dataclass
class Ranking:
    """A metric's score of every layer in the model without some, for each set of layers measured once."""

    bench: MetricContext
    metric: Metric = mean_similarity
    measured: dict[frozenset[Layer], dict[Layer, float]] = field(default_factory=dict)

    def __call__(self, gone: Sequence[Layer] = ()) -> dict[Layer, float]:
        key = frozenset(gone)
        if key not in self.measured:
            with replaced(
                self.bench.runner.model, dropped_modules(self.bench.runner.model, self.bench.architecture, gone)
            ):
                self.measured[key] = self.metric(self.bench)
        return self.measured[key]
