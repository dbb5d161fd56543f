"""Choose layers by what dropping them together does, not by one ranking of the dense model.

one-shot    the ranking of the dense model (`prune.plan.choose`)
iterative   the ranking measured again after each drop, the surviving half of a block still running
greedy      each time the layer whose loss, on top of those gone, costs the least KL to the dense model
refine      swaps in a finished choice for as long as one lowers the KL
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
    """KL(dense || without these layers), each set of layers measured once.

    `variant` gives the model without some layers, with the repairs that are known beforehand.  `batches`: measure on
    these only (None: all).  Time: the part of a forward pass behind the first dropped layer; `ahead` takes any number
    of sets through each block together.  Memory: `DenseReference`, and a stream for each set.
    """

    dense: DenseReference
    variant: Callable[[Sequence[Layer]], Variant]
    batches: Sequence[int] | None = None
    measured: dict[frozenset[Layer], float] = field(default_factory=dict)

    def __call__(self, layers: Sequence[Layer]) -> float:
        self.ahead([layers])
        return self.measured[frozenset(layers)]

    def ahead(self, sets: Iterable[Sequence[Layer]]) -> None:
        """Measure sets that will be asked for."""
        new = list({frozenset(layers): layers for layers in sets if frozenset(layers) not in self.measured}.values())
        if new:
            damages = self.dense.compare_each([self.variant(layers) for layers in new], self.batches)
            self.measured |= {frozenset(s): damage.mean_kl for s, damage in zip(new, damages, strict=True)}


@dataclass(frozen=True)
class Choice:
    """Layers in the order they were chosen, and the cost once each had gone."""

    layers: tuple[Layer, ...]
    costs: tuple[float, ...]


class Goal(Protocol):
    """When to stop, and what a layer is worth: a layer is taken by what it costs for each unit it saves."""

    def reached(self, layers: Sequence[Layer]) -> bool: ...

    def saves(self, layer: Layer) -> float: ...


@dataclass(frozen=True)
class Count:
    """So many layers, each worth the same."""

    count: int

    def __str__(self) -> str:
        return f"{self.count} layers"

    def reached(self, layers: Sequence[Layer]) -> bool:
        return len(layers) >= self.count

    def saves(self, layer: Layer) -> float:
        return 1.0


@dataclass(frozen=True)
class Greedily:
    """How a greedy search measures: `width` candidates at most in a round after the first (None: all that come up),
    `ahead` hears of the sets that a round begins with (None: they are measured as they come up)."""

    width: int | None = None
    ahead: Callable[[Iterable[Sequence[Layer]]], None] | None = None


def greedy(
    candidates: Iterable[Layer], goal: Goal, cost: Cost, start: Sequence[Layer] = (), how: Greedily = Greedily()
) -> Choice:
    """Layers until the goal is reached, one at a time: least cost, for what it saves, on top of those gone.

    `start` are gone already.  A layer's extra cost from an earlier round is used until
    the layer comes to the front of the queue ("lazy" greedy, Minoux 1978), so most candidates are measured
    only in the first round.
    Ties go to the deeper layer.  Raises PlanError when all candidates do not reach the goal.
    """
    picked: list[Layer] = []
    costs = [cost(start) if start else 0.0]
    extra = {layer: -math.inf for layer in candidates if goal.saves(layer) > 0 and not _any_overlap(layer, start)}
    while not goal.reached(picked):
        if not extra:
            raise PlanError(
                f"{goal} cannot be reached with the layers that may go ({len(picked)} of them); ask for less"
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
    """What a layer adds to the cost, for each unit that it saves."""
    return (cost([*chosen, layer]) - base) / goal.saves(layer)


def _cheapest(extra: dict[Layer, float], measure: Callable[[Layer], float], width: int | None) -> Layer:
    """The layer of least extra cost; `extra` is brought up to date for those that were measured."""
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
    """A block holds its branches: what went with it cannot go again."""
    same = (one.index, one.stack) == (other.index, other.stack)
    return same and (one.kind == other.kind or "block" in (one.kind, other.kind))


def iterative(
    ranking: Callable[[Sequence[Layer]], Mapping[Layer, float]],
    candidates: Iterable[Layer],
    count: int,
    start: Sequence[Layer] = (),
) -> Choice:
    """`count` layers, the highest score first, scores measured again after each drop.

    `ranking` gives every layer's score once some have gone (`importance.Ranking`).  A half-dropped block keeps
    running its other half, and that half is scored as it now is (LLM-Drop skips it).  Time: a forward pass
    for each drop.  Memory: a stream.  Raises PlanError for more layers than are left.
    """
    chosen, costs, left = list(start), [], [c for c in candidates if not _any_overlap(c, start)]
    if count > len(left):
        raise PlanError(f"{count} layers cannot go, only {len(left)} of those named are left; ask for fewer")
    for _ in range(count):
        scores = ranking(chosen)
        best = min(left, key=lambda layer: (-scores[layer], -layer.index, layer.kind))
        chosen.append(best)
        costs.append(1 - scores[best])
        left = [layer for layer in left if not _overlap(layer, best)]
    return Choice(tuple(chosen[len(start) :]), tuple(costs))


def refine(layers: Sequence[Layer], candidates: Iterable[Layer], cost: Cost, rounds: int = 1, width: int = 6) -> Choice:
    """Swap a chosen layer for one left out for as long as that lowers the cost; never worse than given.

    A round takes out each layer, cheapest to put back last, and tries the `width` candidates that cost least
    by themselves in its place.  Swaps are between layers of one kind and stack, so that counts stay.
    Time: at most rounds x layers x (width + 1) costs, plus one for each candidate.
    """
    chosen, best = list(layers), cost(layers)
    for _ in range(rounds):
        before = best
        for layer in sorted(chosen, key=lambda gone: cost([l for l in chosen if l != gone])):
            rest = [other for other in chosen if other != layer]
            for other in _stand_ins(layer, rest, candidates, cost)[:width]:
                found = cost([*rest, other])
                if found < best:
                    best, chosen = found, [*rest, other]
                    break
        if best == before:
            break
    return Choice(tuple(chosen), (best,))


def _stand_ins(layer: Layer, rest: Sequence[Layer], candidates: Iterable[Layer], cost: Cost) -> list[Layer]:
    free = [
        other
        for other in candidates
        if (other.kind, other.stack) == (layer.kind, layer.stack) and other != layer and not _any_overlap(other, rest)
    ]
    return sorted(free, key=lambda other: cost([other]))
