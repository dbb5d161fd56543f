"""Choose layers by what dropping them together does, not by one ranking of the dense model.

one-shot    the ranking of the dense model (`prune.plan.choose`)
iterative   the ranking measured again after each drop, the surviving half of a block still running
greedy      each time the layer whose loss, on top of those gone, costs the least KL to the dense model
refine      swaps in a finished choice for as long as one lowers the KL
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from dropformer.metrics.damage import Dense, dropped_modules, first_block
from dropformer.metrics.importance import Bench, PairScore, mean_over_tokens, similarity
from dropformer.metrics.stepping import replaced
from dropformer.prune.architecture import Architecture, Layer

Cost = Callable[[Sequence[Layer]], float]


@dataclass
class KL:
    """KL(dense || without these layers), each set of layers measured once.

    Time: the part of a forward pass behind the first dropped layer.  Memory: `Dense`.
    """

    dense: Dense
    architecture: Architecture
    measured: dict[frozenset[Layer], float] = field(default_factory=dict)

    def __call__(self, layers: Sequence[Layer]) -> float:
        key = frozenset(layers)
        if key not in self.measured:
            with replaced(self.dense.stepper.model, dropped_modules(self.architecture, layers)):
                self.measured[key] = self.dense.compare(first_block(layers)).mean_kl
        return self.measured[key]


@dataclass(frozen=True)
class Choice:
    """Layers in the order they were chosen, and the cost once each had gone."""

    layers: tuple[Layer, ...]
    costs: tuple[float, ...]


def greedy(
    candidates: Iterable[Layer], count: int, cost: Cost, start: Sequence[Layer] = (), width: int | None = None
) -> Choice:
    """`count` layers, one at a time, each the one that costs least on top of `start` and those before it.

    A layer's extra cost from an earlier round stands in for the present one until the layer comes to the
    front of the queue ("lazy" greedy, Minoux 1978), so most candidates are measured only in the first
    round; `width` bounds how many are measured in a later one (None: as many as come to the front).
    Ties go to the deeper layer.
    """
    chosen, costs = list(start), []
    base = cost(chosen) if chosen else 0.0
    extra = {layer: -math.inf for layer in candidates if layer not in chosen}
    for turn in range(count):
        best = _cheapest(extra, partial(_extra, cost, tuple(chosen), base), None if turn == 0 else width)
        base += extra.pop(best)
        chosen.append(best)
        costs.append(base)
        extra = {layer: value for layer, value in extra.items() if not _overlap(layer, best)}
    return Choice(tuple(chosen[len(start) :]), tuple(costs))


def _extra(cost: Cost, chosen: Sequence[Layer], base: float, layer: Layer) -> float:
    return cost([*chosen, layer]) - base


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


def _overlap(one: Layer, other: Layer) -> bool:
    """A block holds its branches: what went with it cannot go again."""
    same = (one.index, one.stack) == (other.index, other.stack)
    return same and (one.kind == other.kind or "block" in (one.kind, other.kind))


def iterative(
    bench: Bench, candidates: Iterable[Layer], count: int, start: Sequence[Layer] = (), score: PairScore = similarity
) -> Choice:
    """`count` layers, the highest score first, scores measured anew on the model as it stands after each drop.

    A half-dropped block keeps running its other half, and that half is scored as it now is (LLM-Drop skips
    it).  Time: the part of a forward pass behind the first candidate, for each drop.  Memory: a stream.
    """
    chosen, costs, left = list(start), [], [c for c in candidates if c not in start]
    for _ in range(count):
        with replaced(bench.stepper.model, dropped_modules(bench.architecture, chosen)):
            scores = mean_over_tokens(score)(bench)
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
        if (other.kind, other.stack) == (layer.kind, layer.stack)
        and other != layer
        and not any(_overlap(other, gone) for gone in rest)
    ]
    return sorted(free, key=lambda other: cost([other]))
