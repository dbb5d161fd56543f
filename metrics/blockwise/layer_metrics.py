"""Ways to score a layer's redundancy.  Every metric gives a number a layer, and the highest goes first.

    similarity          cos(x, y)                                         arXiv 2406.15786, eq. 1-4
    angular             1 - arccos(cos(x, y)) / pi                        arXiv 2403.17887
    relative-magnitude  -|y - x| / |y|                                    arXiv 2312.09299
    loo-kl              -KL(dense || without the layer)                   ground truth for one dropped layer
    loo-perplexity      -log perplexity without the layer                 arXiv 2402.09025 (SLEB), for one layer
    cca                 -bound on the error of the best linear map x -> y arXiv 2505.21077 (NBL)
    random, reverse     baselines: any order, and the worst one

x and y are the residual stream before and after the layer, at scored tokens.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dropformer.metrics.analysis.similarity import cosine, dot, norm
from dropformer.metrics.blockwise.divergence import DenseReference, dropped_modules, first_block
from dropformer.metrics.blockwise.residuals import residual_pairs
from dropformer.metrics.blockwise.runner import BlockRunner, replaced
from dropformer.prune.architecture import Architecture, Layer


@dataclass(frozen=True)
class MetricContext:
    """What a metric works on: a model taken apart, its anatomy, and which positions count (None: all)."""

    runner: BlockRunner
    architecture: Architecture
    scored: list[Tensor | None]
    stride: int = 4  # log-probabilities are compared at every 4th position
    seed: int = 0

    def layers(self) -> list[Layer]:
        return self.architecture.layers()

    def weight(self, batch: int) -> Tensor:
        """1 at scored positions, else 0, [B, T] float64."""
        start, scored = self.runner.start(batch), self.scored[batch]
        if scored is None:
            return torch.ones(start.shape[:2], dtype=torch.float64, device=start.device)
        return scored.to(start.device, torch.float64)


PairScore = Callable[[Tensor, Tensor], Tensor]


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """cos(x, y) per token.  [..., D] -> [...]."""
    x, y = x.float(), y.float()
    return cosine(dot(x, y), norm(x), norm(y))


def angular(x: Tensor, y: Tensor) -> Tensor:
    """1 minus the angle between x and y in half turns: 1 where they agree, 0 where they are opposed."""
    return 1 - torch.arccos(similarity(x, y).clamp(-1, 1)) / math.pi


def relative_magnitude(x: Tensor, y: Tensor) -> Tensor:
    """-|y - x| / |y| per token: how little of the stream after the layer is the layer's."""
    return -norm((y - x).float()) / norm(y.float()).clamp_min(torch.finfo(torch.float32).tiny)


def mean_over_tokens(score: PairScore) -> Callable[[MetricContext], dict[Layer, float]]:
    """A metric from a number per token.  One forward pass; memory: one block's streams."""

    def metric(bench: MetricContext) -> dict[Layer, float]:
        sums: dict[Layer, float] = defaultdict(float)
        tokens = 0.0
        with torch.inference_mode():
            for batch in range(len(bench.runner)):
                weight = bench.weight(batch)
                tokens += float(weight.sum())
                for layer, x, y in residual_pairs(bench.runner, batch):
                    sums[layer] += float((score(x, y).double() * weight).sum())
        return {layer: total / tokens for layer, total in sums.items()}

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
    found = {}
    for layer in layers:
        with replaced(bench.runner.model, dropped_modules(bench.architecture, [layer])):
            damage = dense.compare(first_block([layer]))
        found[layer] = damage.mean_kl, float(damage.nll.mean())
    return found


def cca_bound(bench: MetricContext) -> dict[Layer, float]:
    """-sum(1 - rho_i^2) over the canonical correlations of x and y, at most 0.

    It bounds the normalized error of the best linear map from x to y (NBL, arXiv 2505.21077, where y
    includes the residual too), so the layer that is most nearly linear goes first.  Time: one forward
    pass and a D x D eigenproblem a layer.  Memory: three D x D sums in float64 a layer.
    """
    sums: dict[Layer, Moments] = {}
    with torch.inference_mode():
        for batch in range(len(bench.runner)):
            keep = bench.weight(batch).bool()
            for layer, x, y in residual_pairs(bench.runner, batch):
                sums.setdefault(layer, Moments(x.shape[-1])).add(x[keep], y[keep])
    return {layer: -moments.unexplained() for layer, moments in sums.items()}


class Moments:
    """Second moments of pairs of vectors, accumulated in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum = torch.zeros(2, width, dtype=torch.float64)
        self.products = torch.zeros(3, width, width, dtype=torch.float64)  # xx, yy, yx

    def add(self, x: Tensor, y: Tensor) -> None:
        """x, y: [n, D]."""
        x, y = x.double().cpu(), y.double().cpu()
        self.count += len(x)
        self.sum += torch.stack([x.sum(0), y.sum(0)])
        self.products += torch.stack([x.T @ x, y.T @ y, y.T @ x])

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Cov(x, x), Cov(y, y), Cov(y, x), [D, D] each."""
        x, y = self.sum / self.count
        xx, yy, yx = self.products / self.count
        return xx - torch.outer(x, x), yy - torch.outer(y, y), yx - torch.outer(y, x)

    def unexplained(self) -> float:
        """sum over i of (1 - rho_i^2), the canonical correlations rho of x and y."""
        xx, yy, yx = self.covariances()
        rho = torch.linalg.svdvals(_inverse_root(yy) @ yx @ _inverse_root(xx)).clamp(0, 1)
        return float((1 - rho.square()).sum())


def _inverse_root(covariance: Tensor) -> Tensor:
    """C^(-1/2) of a symmetric matrix; directions without variance count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * 1e-10
    scale = torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)
    return (vectors * scale) @ vectors.T


def at_random(bench: MetricContext) -> dict[Layer, float]:
    """Uniform numbers from the seed."""
    draw = random.Random(bench.seed)
    return {layer: draw.random() for layer in bench.layers()}


def reverse(bench: MetricContext) -> dict[Layer, float]:
    """The least similar first: what choosing as badly as possible costs."""
    return {layer: -value for layer, value in METRICS["similarity"](bench).items()}


METRICS: Mapping[str, Callable[[MetricContext], dict[Layer, float]]] = {
    "similarity": mean_over_tokens(similarity),
    "angular": mean_over_tokens(angular),
    "relative-magnitude": mean_over_tokens(relative_magnitude),
    "loo-kl": leave_one_out_kl,
    "loo-perplexity": leave_one_out_perplexity,
    "cca": cca_bound,
    "random": at_random,
    "reverse": reverse,
}


@dataclass
class Ranking:
    """A metric's score of every layer in the model without some, for each set of layers measured once."""

    bench: MetricContext
    metric: str = "similarity"
    measured: dict[frozenset[Layer], dict[Layer, float]] = field(default_factory=dict)

    def __call__(self, gone: Sequence[Layer] = ()) -> dict[Layer, float]:
        key = frozenset(gone)
        if key not in self.measured:
            with replaced(self.bench.runner.model, dropped_modules(self.bench.architecture, gone)):
                self.measured[key] = METRICS[self.metric](self.bench)
        return self.measured[key]
