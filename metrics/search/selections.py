"""Selections: candidates are shortlisted unrepaired, then chosen with the foreseen repairs in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dropformer.metrics.search.budget import Meter, meter, parse_budget, within
from dropformer.metrics.search.select import Choice, Count, greedy, iterative
from dropformer.prune.architecture import Layer
from dropformer.prune.choosing import check_attention_left, unprotected
from dropformer.prune.errors import PlanError

if TYPE_CHECKING:
    from dropformer.metrics.blockwise.layer_metrics import Ranking
    from dropformer.metrics.search.select import KL, Greedily
    from dropformer.metrics.search.strategy import Strategy, Target
    from dropformer.prune.outline import Outline

SHORTLIST = 2  # candidates per layer to drop that a search measures repaired, the best ones alone and unrepaired


class Costs(Protocol):
    """The part of `Improver` that selections use: rankings, and the cost of a set with and without repairs."""

    quality: Strategy
    outline: Outline

    @property
    def cost(self) -> KL: ...

    @property
    def bare(self) -> KL: ...

    @property
    def how(self) -> Greedily: ...

    def ranking(self, metric: str) -> Ranking: ...

    def prepare(self, candidates: Sequence[Layer], count: int) -> None: ...

    def expect(self, evaluations: float) -> None: ...


def pick_iterative(improver: Costs, free: Sequence[Layer], count: int, dropped: Sequence[Layer]) -> Sequence[Layer]:
    """`count` of the free layers on top of the dropped ones, with the ranking measured again after each."""
    return iterative(improver.ranking(improver.quality.metric), free, count, dropped).layers


def pick_greedy(improver: Costs, free: Sequence[Layer], count: int, dropped: Sequence[Layer]) -> Sequence[Layer]:
    """`count` of the free layers by least KL with the foreseen repairs, from a shortlist made without them."""
    short = shortlist(improver, free, count, dropped)
    improver.prepare([*short, *dropped], count)
    improver.cost.ahead([*dropped, layer] for layer in short)
    while True:
        found = greedy(short, Count(count), improver.cost, dropped, improver.how).layers
        try:
            check_attention_left(improver.outline, [*dropped, *found])
            return found
        except PlanError:  # such as a hybrid's only attention with keys: others are dropped instead
            if len(short) <= count:
                return found
            short = [layer for layer in short if layer != _last_with_keys(improver, found)]


def _last_with_keys(improver: Costs, chosen: Sequence[Layer]) -> Layer:
    """The last chosen layer with keys and values, else the last one."""
    outline = improver.outline
    held = [one for one in chosen if any(outline.branch(part).kv for part in outline.branch_layers([one]))]
    return (held or list(chosen))[-1]


def shortlist(improver: Costs, free: Sequence[Layer], count: int, dropped: Sequence[Layer] = ()) -> list[Layer]:
    """The candidates of least cost alone and unrepaired, twice as many as are to be dropped."""
    improver.expect(_evaluations(len(free), count))
    if len(free) <= SHORTLIST * count:
        return list(free)
    improver.bare.ahead([*dropped, layer] for layer in free)
    costs = {layer: improver.bare([*dropped, layer]) for layer in free}
    return sorted(free, key=lambda layer: (costs[layer], -layer.index, layer.kind))[: SHORTLIST * count]


def affordable(improver: Costs, candidates: Sequence[Layer], goal: Meter) -> list[Layer]:
    """The candidates of least unrepaired cost per unit saved, until they save twice the budget."""
    useful = [layer for layer in candidates if goal.saves(layer) > 0]
    improver.expect(_evaluations(len(useful), max(1, len(useful) // 2)))
    improver.bare.ahead([layer] for layer in useful)
    found: list[Layer] = []
    for layer in sorted(useful, key=lambda layer: improver.bare([layer]) / goal.saves(layer)):
        if goal.saved(found) >= SHORTLIST * goal.budget.amount:
            break
        found.append(layer)
    return [layer for layer in candidates if layer in found]


def _evaluations(candidates: int, count: int) -> float:
    """Approximate passes of a search over its windows: one dense; per candidate half a pass on half of the windows;
    half a pass per shortlisted one; and one and a half per round."""
    short = min(candidates, SHORTLIST * count)
    return 1 + (candidates / 4 if short < candidates else 0) + short / 2 + 1.5 * (count - 1)


def within_budget(improver: Costs, target: Target, width: int) -> Choice:
    """A budget's layers, of a model of this width; if they would leave no attention, the one chosen last is kept."""
    outline = improver.outline
    candidates = unprotected(outline, ("attn", "mlp"), "", target.keep)
    map_size = width * (width + 1) if "linear" in improver.quality.repair else 0
    budget = parse_budget(target.budget or "")
    goal = meter(budget, outline, candidates, target.context, target.latency, map_size)
    candidates = affordable(improver, candidates, goal)
    improver.prepare(candidates, len(candidates))
    improver.cost.ahead([layer] for layer in candidates if goal.saves(layer) > 0)
    while True:
        found = within(goal, candidates, improver.cost, improver.how)
        try:
            check_attention_left(outline, found.layers)
            return found
        except PlanError:
            candidates.remove([layer for layer in found.layers if layer.kind == "attn"][-1])
