"""Selection of layers by the effect of dropping them together, not by one ranking of the dense model.

one-shot    the ranking of the dense model (`prune.plan.choose`)
iterative   the ranking measured again after each drop, the surviving half of a block still running
greedy      each time the layer that adds the least KL to the dense model
refine      swaps in a finished selection as long as one lowers the KL
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from dropformer.metrics.blockwise.divergence import DenseReference
from dropformer.metrics.blockwise.variant import Variant
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import PlanError

Cost = Callable[[Sequence[Layer]], float]


@dataclass
class KL:
    """KL(dense || without these layers), measured once per set of layers.

    `variant` returns the model without some layers, with the foreseen repairs.  `batches`: measure on these only
    (None: all).  Time: a forward pass from the first dropped layer on; `ahead` runs any number of sets through each
    block together.  Memory: `DenseReference`, and one stream per set.
    """

    dense: DenseReference
    variant: Callable[[Sequence[Layer]], Variant]
    batches: Sequence[int] | None = None
    measured: dict[frozenset[Layer], float] = field(default_factory=dict)

    def __call__(self, layers: Sequence[Layer]) -> float:
        self.ahead([layers])
        return self.measured[frozenset(layers)]

    def ahead(self, sets: Iterable[Sequence[Layer]]) -> None:
        """Measure several sets together."""
        new = list({frozenset(layers): layers for layers in sets if frozenset(layers) not in self.measured}.values())
        if new:
            found = self.dense.compare_each([self.variant(layers) for layers in new], self.batches)
            self.measured |= {frozenset(s): one.mean_kl for s, one in zip(new, found, strict=True)}


@dataclass(frozen=True)
class Choice:
    """Layers in the order of selection, and the cost after each."""

    layers: tuple[Layer, ...]
    costs: tuple[float, ...]


class Goal(Protocol):
    """When to stop, and what a layer saves; layers are taken by their cost per unit saved."""

    def reached(self, layers: Sequence[Layer]) -> bool: ...

    def saves(self, layer: Layer) -> float: ...


@dataclass(frozen=True)
class Count:
    """A number of layers, of equal worth."""

    count: int

    def __str__(self) -> str:
        return f"{self.count} layers"

    def reached(self, layers: Sequence[Layer]) -> bool:
        return len(layers) >= self.count

    def saves(self, layer: Layer) -> float:
        return 1.0


@dataclass(frozen=True)
class Greedily:
    """Settings of a greedy search.  `width`: most candidates measured in a round after the first (None: no limit);
    `ahead`: called with a round's first sets, to measure them together (None: one at a time)."""

    width: int | None = None
    ahead: Callable[[Iterable[Sequence[Layer]]], None] | None = None


def greedy(
    candidates: Iterable[Layer], goal: Goal, cost: Cost, start: Sequence[Layer] = (), how: Greedily = Greedily()
) -> Choice:
    """Layers until the goal is reached, each time the one of least added cost per unit saved.

    `start` are dropped already.  A layer's added cost from an earlier round is used until it comes to the front of the
    queue ("lazy" greedy, Minoux 1978), so most candidates are measured only in the first round.  Ties: the deeper
    layer.  Raises PlanError if all candidates together do not reach the goal.
    """
    picked: list[Layer] = []
    costs = [cost(start) if start else 0.0]
    extra = {layer: -math.inf for layer in candidates if goal.saves(layer) > 0 and not _any_overlap(layer, start)}
    while not goal.reached(picked):
        if not extra:
            raise PlanError(
                f"{goal} cannot be reached with the layers that may be dropped ({len(picked)} of them); ask for less"
            )
        measure = partial(_extra, cost, goal, (*start, *picked), costs[-1])
        if how.ahead:
            soon = sorted(extra, key=lambda layer: (extra[layer], -layer.index, layer.kind))
            how.ahead([*start, *picked, layer] for layer in soon[: how.width if picked else None])
        best = _cheapest(extra, measure, how.width if picked else None)
        picked.append(best)
        costs.append(cost([*start, *picked]))
        extra = {layer: value for layer, value in extra.items() if not _overlap(layer, best)}
    return Choice(tuple(picked), tuple(costs[1:]))


def _extra(cost: Cost, goal: Goal, chosen: Sequence[Layer], base: float, layer: Layer) -> float:
    """A layer's added cost per unit saved."""
    return (cost([*chosen, layer]) - base) / goal.saves(layer)


def _cheapest(extra: dict[Layer, float], measure: Callable[[Layer], float], width: int | None) -> Layer:
    """The layer of least added cost; updates `extra` for the layers that are measured."""
    fresh: set[Layer] = set()
    while True:
        best = min(extra, key=lambda layer: (extra[layer], -layer.index, layer.kind))
        if best in fresh:
            return best
        if width is not None and len(fresh) >= width:
            return min(fresh, key=lambda layer: (extra[layer], -layer.index, layer.kind))
        extra[best] = measure(best)
        fresh.add(best)


def _any_overlap(layer: Layer, others: Iterable[Layer]) -> bool:
    return any(_overlap(layer, other) for other in others)


def _overlap(one: Layer, other: Layer) -> bool:
    """Whether both are the same layer, or one is a branch of the other."""
    same = (one.index, one.stack) == (other.index, other.stack)
    return same and (one.kind == other.kind or "block" in (one.kind, other.kind))


def iterative(
    ranking: Callable[[Sequence[Layer]], Mapping[Layer, float]],
    candidates: Iterable[Layer],
    count: int,
    start: Sequence[Layer] = (),
) -> Choice:
    """`count` layers, the highest score first, with scores measured again after each drop.

    `ranking` returns the scores of all layers without the given ones (`layer_metrics.Ranking`).  The kept branch of a
    half-dropped block still runs and is scored (LLM-Drop skips it).  Time: a forward pass per drop.  Memory: a stream.
    Raises PlanError for more layers than are left.
    """
    chosen, costs, left = list(start), [], [c for c in candidates if not _any_overlap(c, start)]
    if count > len(left):
        raise PlanError(f"{count} layers cannot be dropped, only {len(left)} of those named are left; ask for fewer")
    for _ in range(count):
        scores = ranking(chosen)
        best = min(left, key=lambda layer: (-scores[layer], -layer.index, layer.kind))
        chosen.append(best)
        costs.append(1 - scores[best])
        left = [layer for layer in left if not _overlap(layer, best)]
    return Choice(tuple(chosen[len(start) :]), tuple(costs))


def refine(layers: Sequence[Layer], candidates: Iterable[Layer], cost: Cost, rounds: int = 1, width: int = 6) -> Choice:
    """Swap chosen layers for others as long as that lowers the cost; the result is never worse.

    A round visits the chosen layers, first the one whose return lowers the cost most, and tries the `width` candidates
    of least cost alone in its place.  Swaps are within a kind and stack, so counts stay the same.
    Time: at most rounds x layers x (width + 1) costs, plus one per candidate.
    """
    chosen, best = list(layers), cost(layers)
    for _ in range(rounds):
        before = best
        for layer in sorted(chosen, key=lambda out: cost([l for l in chosen if l != out])):
            rest = [other for other in chosen if other != layer]
            for other in _substitutes(layer, rest, candidates, cost)[:width]:
                found = cost([*rest, other])
                if found < best:
                    best, chosen = found, [*rest, other]
                    break
        if best == before:
            break
    return Choice(tuple(chosen), (best,))


def _substitutes(layer: Layer, rest: Sequence[Layer], candidates: Iterable[Layer], cost: Cost) -> list[Layer]:
    free = [
        other
        for other in candidates
        if (other.kind, other.stack) == (layer.kind, layer.stack) and other != layer and not _any_overlap(other, rest)
    ]
    return sorted(free, key=lambda other: cost([other]))
