"""Redundancy metrics: one score per layer, the highest are dropped first (`search.registry.METRICS`).

    similarity          cos(x, y)                           arXiv 2406.15786, eq. 1-4
    angular             1 - arccos(cos(x, y)) / pi          arXiv 2403.17887
    relative-magnitude  -|y - x| / |y|                      arXiv 2312.09299
    loo-kl              -KL(dense || without the layer)     ground truth for one dropped layer
    loo-perplexity      -log perplexity without the layer   arXiv 2402.09025 (SLEB), for one layer

x and y are the residual stream before and after the layer, at scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dropformer.metrics.analysis.similarity import cosine, distance, norm
from dropformer.metrics.blockwise.divergence import DenseReference, Divergence, dropped_modules
from dropformer.metrics.blockwise.residuals import residual_pairs
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import variant
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.loading.parts import replaced


@dataclass(frozen=True)
class MetricContext:
    """Input of a metric: a block runner, the architecture, and the scored positions per batch (None: all)."""

    runner: BlockRunner
    architecture: Architecture
    scored: list[Tensor | None]
    stride: int = 4  # positions between those at which log-probabilities are compared

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
    """1 - angle(x, y) / pi per token: 1 for equal directions, 0 for opposite ones."""
    return 1 - torch.arccos(similarity(x, y).clamp(-1, 1)) / math.pi


def relative_magnitude(x: Tensor, y: Tensor) -> Tensor:
    """-|y - x| / |y| per token: minus the layer's share of the stream after it."""
    return -norm((y - x).float()) / norm(y.float()).clamp_min(torch.finfo(torch.float32).tiny)


def mean_over_tokens(score: PairScore) -> Metric:
    """A metric from a score per token.  Time: one forward pass.  Memory: one block's input and output streams."""

    def metric(context: MetricContext) -> dict[Layer, float]:
        sums: dict[Layer, Tensor] = {}
        with torch.inference_mode():
            weights = [context.weight(batch) for batch in range(len(context.runner))]
            for batch, layer, x, y in residual_pairs(context.runner):
                found = (score(x, y.to(x.device)).double() * weights[batch].to(x.device)).sum()
                sums[layer] = sums[layer].to(found.device) + found if layer in sums else found
        counted = float(sum(w.sum() for w in weights))
        return {layer: float(total) / counted for layer, total in sums.items()}

    return metric


def leave_one_out_kl(context: MetricContext) -> dict[Layer, float]:
    """-KL(dense || without the layer) per layer.

    Time: on average half a forward pass per layer, as the dense stream before it is reused.  Memory: `DenseReference`.
    """
    return {layer: -found.mean_kl for layer, found in leave_one_out(context).items()}


def leave_one_out_perplexity(context: MetricContext) -> dict[Layer, float]:
    """-log perplexity without the layer, per layer.  Time and memory: as `leave_one_out_kl`."""
    return {layer: -float(found.nll.mean()) for layer, found in leave_one_out(context).items()}


def leave_one_out(context: MetricContext) -> dict[Layer, Divergence]:
    """The divergence from the dense model with each layer dropped by itself."""
    dense, layers = DenseReference(context.runner, context.stride, context.scored), context.layers()
    variants = [variant(context.runner.model, context.architecture, [layer]) for layer in layers]
    return dict(zip(layers, dense.compare_each(variants), strict=True))


mean_similarity = mean_over_tokens(similarity)
mean_angular = mean_over_tokens(angular)
mean_relative_magnitude = mean_over_tokens(relative_magnitude)


@dataclass
class Ranking:
    """A metric's scores in the model without some layers, measured once for each set of them."""

    context: MetricContext
    metric: Metric = mean_similarity
    measured: dict[frozenset[Layer], dict[Layer, float]] = field(default_factory=dict)

    def __call__(self, dropped: Sequence[Layer] = ()) -> dict[Layer, float]:
        key = frozenset(dropped)
        if key not in self.measured:
            model = self.context.runner.model
            with replaced(model, dropped_modules(model, self.context.architecture, dropped)):
                self.measured[key] = self.metric(self.context)
        return self.measured[key]
