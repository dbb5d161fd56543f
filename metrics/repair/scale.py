"""One scalar for each gap, folded into weights (Prune&Comp, arXiv 2507.18212).

A dropped layer leaves the stream smaller than the layers behind the gap expect, by a = E|dense stream after
the gap| / E|dense stream before it|.  Multiplying the stream by a at the gap is the same, for a model whose
blocks read their stream through a norm, as dividing by a whatever is added behind it: so every later
projection shrinks, and the embedding, which may be tied to the head, stays as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dropformer.metrics.analysis.similarity import norm
from dropformer.metrics.blockwise.layer_metrics import MetricContext
from dropformer.metrics.blockwise.residuals import residual_pairs
from dropformer.metrics.repair.projection import OutputProjection, scaled
from dropformer.metrics.repair.refit import in_order
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import ArchitectureError


def growth(bench: MetricContext) -> dict[Layer, tuple[float, float]]:
    """Mean norm of the stream before and after each branch, over scored tokens.  One forward pass."""
    sums: dict[Layer, list[float]] = defaultdict(lambda: [0.0, 0.0])
    tokens = 0.0
    with torch.inference_mode():
        for batch in range(len(bench.runner)):
            weight = bench.weight(batch)
            tokens += float(weight.sum())
            for layer, x, y in residual_pairs(bench.runner, batch):
                for k, stream in enumerate((x, y)):
                    sums[layer][k] += float((norm(stream.float()).double() * weight).sum())
    return {layer: (before / tokens, after / tokens) for layer, (before, after) in sums.items()}


def factors(bench: MetricContext, gone: Sequence[Layer]) -> dict[Layer, float]:
    """For every kept branch, what its projection is multiplied by: 1 / (the product of a over earlier gaps)."""
    order, dropped = in_order(bench.architecture, gone)
    sizes = growth(bench)
    found, factor, start = {}, 1.0, None
    for layer in order:
        if layer in dropped:
            start = layer if start is None else start
            last = layer
            continue
        if start is not None:
            factor *= sizes[start][0] / sizes[last][1]
            start = None
        found[layer] = factor
    return {layer: factor for layer, factor in found.items() if factor != 1.0}


def scale_modules(
    bench: MetricContext, gone: Sequence[Layer], projections: Mapping[Layer, OutputProjection]
) -> dict[str, nn.Module]:
    """Rescaled copies of the projections behind the gaps.

    Raises ArchitectureError where a branch behind a gap has no projection of its own (experts, post-norms).
    """
    modules = {}
    for layer, factor in factors(bench, gone).items():
        if layer not in projections:
            raise ArchitectureError(
                f"{layer} has no single output projection, so --repair scale has nothing to fold into"
            )
        path = projections[layer].path
        modules[path] = scaled(bench.runner.model.get_submodule(path), factor)
    return modules
