"""Budgets instead of counts: kv:-25%, params:-20%, decode:1.3x, measured:1.3x."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dropformer.prune.architecture import Layer
from dropformer.prune.choosing import unprotected
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import Outline

if TYPE_CHECKING:
    from dropformer.metrics.search.select import Choice, Cost, Greedily

_BUDGET = re.compile(
    r"(?P<what>kv|params):-(?P<share>\d+(?:\.\d+)?)%|(?P<speed>decode|measured):(?P<factor>\d+(?:\.\d+)?)x"
)
EXPECTED = (
    "expected kv:-25% (cache), params:-20% (weights), decode:1.3x (tokens a second, by the bytes they read) "
    "or measured:1.3x (by the time each layer takes on this machine)"
)


@dataclass(frozen=True)
class Budget:
    """The share to save, `amount` in (0, 1): of the KV cache, the parameters, or the time of a decoded token."""

    what: str
    amount: float

    def __str__(self) -> str:
        if self.what in ("decode", "measured"):
            return f"{self.what}:{1 / (1 - self.amount):g}x"
        return f"{self.what}:-{100 * self.amount:.6g}%"


def parse_budget(text: str) -> Budget:
    """The budget of `--budget`.  Raises PlanError."""
    found = _BUDGET.fullmatch(text.replace(" ", ""))
    if not found:
        raise PlanError(f"budget `{text}` cannot be read; {EXPECTED}")
    factor = float(found["factor"] or 0)
    amount = 1 - 1 / factor if factor else float(found["share"] or 0) / 100
    if not 0 < amount < 1:
        raise PlanError(f"budget `{text}` saves nothing, or all; {EXPECTED}")
    return Budget(found["what"] or found["speed"], amount)


@dataclass(frozen=True)
class Latency:
    """Seconds per layer of one decoded token, and of the whole token."""

    seconds: Mapping[Layer, float]
    total: float


@dataclass(frozen=True)
class Meter:
    """A budget as the goal of a search: each layer's share of the whole, and the share to save."""

    budget: Budget
    shares: Mapping[Layer, float]

    def __str__(self) -> str:
        return f"budget {self.budget}"

    def reached(self, layers: Sequence[Layer]) -> bool:
        return self.saved(layers) >= self.budget.amount - 1e-12

    def saves(self, layer: Layer) -> float:
        return self.shares.get(layer, 0.0)

    def saved(self, layers: Iterable[Layer]) -> float:
        return sum(map(self.saves, layers))


def meter(
    budget: Budget,
    outline: Outline,
    candidates: Iterable[Layer],
    context: int = 2048,
    latency: Latency | None = None,
    map_size: int = 0,
) -> Meter:
    """What each candidate saves of the budget's quantity.

    For `decode` a token costs reading every weight and the cache of `context` tokens, in one dtype; for `measured`,
    `latency`.  `map_size`: parameters of the linear map that replaces a dropped attention layer.  Raises PlanError if
    the model has nothing of the quantity.
    """
    sizes = {layer: outline.dropped_parameters([layer]) for layer in candidates}
    stays = {layer: min(map_size, size) if layer.kind == "attn" else 0 for layer, size in sizes.items()}
    if budget.what == "measured":
        if latency is None:
            raise PlanError(f"budget `{budget}` needs the time that each layer takes (`layer_latency`)")
        shares = {layer: latency.seconds.get(layer, 0.0) / latency.total for layer in sizes}
        return Meter(budget, {layer: share * (1 - stays[layer] / sizes[layer]) for layer, share in shares.items()})
    weight = {"params": (1, 0), "kv": (0, 1), "decode": (1, 1)}[budget.what]
    whole = weight[0] * outline.parameters + weight[1] * outline.kv_at(context)
    if not whole:
        raise PlanError(f"budget `{budget}` counts the KV cache, and this model has none; use params:-20%")
    kv = {layer: outline.kv_at(context) - outline.kv_at(context, [layer]) for layer in sizes}
    saved = {layer: weight[0] * (sizes[layer] - stays[layer]) + weight[1] * kv[layer] for layer in sizes}
    return Meter(budget, {layer: amount / whole for layer, amount in saved.items()})


def check_budget(budget: Budget, outline: Outline, keep: Sequence[int], context: int) -> None:
    """Raises PlanError if all droppable layers save too little; measured times are not known yet."""
    if budget.what == "measured":
        return
    candidates = unprotected(outline, ("attn", "mlp"), "", keep)
    goal = meter(budget, outline, candidates, context)
    if not goal.reached(candidates):
        raise PlanError(
            f"{goal} cannot be reached with the layers that may be dropped ({len(candidates)} of them); ask for less"
        )


def within(goal: Meter, candidates: Iterable[Layer], cost: Cost, how: Greedily | None = None) -> Choice:
    """Layers that meet the budget, selected jointly by KL per unit saved; then redundant picks are removed.

    Greedy overshoots with its last layer, so layers that the budget no longer needs are put back, those that save
    most first.  Time: as `greedy`, and one more cost.  Raises PlanError if all candidates together save too little.
    """
    from dropformer.metrics.search.select import Choice, Greedily, greedy  # they import torch

    found = greedy(candidates, goal, cost, how=how or Greedily())
    kept = list(found.layers)
    for layer in sorted(found.layers, key=lambda layer: -goal.saves(layer)):
        rest = [other for other in kept if other != layer]
        if rest and goal.reached(rest):
            kept = rest
    return found if len(kept) == len(found.layers) else Choice(tuple(kept), (cost(kept),))
