"""A plan of rungs under a budget, by the KL divergence of each at the end of long texts.

Each layer is measured alone on its narrowest window and dropped; the cost of wider windows is scaled by how much they
change.  The plan of least sum is measured as a whole, then each of its layers is put back in turn: the KL that this
recovers is the layer's cost beside the others, and the next plan is chosen by these.  All within PASSES forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dropformer.metrics.blockwise.variant import variant
from dropformer.metrics.search.budget import parse_budget
from dropformer.metrics.search.far_text import Action, FarText, Fitted, Maps
from dropformer.metrics.search.improve import Improver
from dropformer.metrics.search.ladder import Option, check_rungs, climb, saved_share
from dropformer.metrics.search.strategy import Target
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.choosing import check_attention_left, unprotected
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.outline import Outline
from dropformer.prune.plan import Plan, make_plan
from dropformer.prune.rungs.linear import LinearMap
from dropformer.prune.rungs.registry import Rung
from dropformer.prune.rungs.window import Windowed
from dropformer.prune.window import Window

PASSES, ROUNDS = 6.0, 3
STEPS = (1.0, 0.5, 0.25)  # exponents between a layer's cost alone (0) and its cost beside the others (1)
LEAST, MOST = 0.2, 5.0  # bounds of the factor by which a round changes a layer's cost


@dataclass
class RungSearch:
    """The cost of each action per layer, in nats of KL at the ends of these texts.

    `kl`: of the last plan found; `history`: of each plan measured on the way; `map_size`: parameters of a linear map;
    `tick`: told the passes so far after each measurement.
    Several budgets share the costs of the layers alone.
    """

    texts: Sequence[FarText]
    layers: Sequence[Layer]
    actions: Sequence[Action]
    map_size: int = 0
    kl: float = 0.0
    history: list[float] = field(default_factory=list)
    tick: Callable[[float], None] = lambda passes: None
    _alone: dict[Layer, dict[Action, float]] = field(default_factory=dict)
    _works: list[float] = field(default_factory=list)

    @property
    def passes(self) -> float:
        """Forward passes over the texts so far."""
        return sum(text.work for text in self.texts) / len(self.texts)

    def measured(self, actions: Mapping[Layer, Action]) -> float:
        found = sum(text.kl(actions) for text in self.texts) / len(self.texts) if actions else 0.0
        self.tick(self.passes)
        return found

    def alone(self) -> dict[Layer, dict[Action, float]]:
        """Each layer's costs alone: measured for a drop, a map and the narrowest window, scaled for wider windows."""
        if not self._alone:
            self._alone = {layer: self._of(layer) for layer in self.layers}
            self._works = [text.work for text in self.texts]
        for text, work in zip(self.texts, self._works, strict=True):
            text.work = work
        self.history = []
        return self._alone

    def _of(self, layer: Layer) -> dict[Action, float]:
        windows = sorted(action for action in self.actions if isinstance(action, Window))
        others = [action for action in self.actions if not isinstance(action, Window)]
        found: dict[Action, float] = {action: self.measured({layer: action}) for action in others}
        narrow = self.measured({layer: windows[0]})
        changes = {w: sum(text.damages[layer][w] for text in self.texts) for w in windows}
        whole = changes[windows[0]]
        return found | {w: narrow * (changes[w] / whole if whole else 0.0) for w in windows}

    def beside(
        self, chosen: Mapping[Layer, Action], costs: Mapping[Layer, Mapping[Action, float]]
    ) -> dict[Layer, float]:
        """Each layer's cost beside the other chosen ones, over its assumed cost.

        Layers that were not chosen: the square root of the median.
        """
        factors = {}
        for layer, action in chosen.items():
            gain = self.kl - self.measured({key: own for key, own in chosen.items() if key != layer})
            known = costs[layer][action]
            factors[layer] = min(MOST, max(LEAST, gain / known)) if known > 0 else 1.0
        middle = median(factors.values()) ** 0.5
        return {layer: factors.get(layer, middle) for layer in costs}

    def room(self, changed: int) -> bool:
        """Whether passes are left to put each changed layer back once, and to measure the next plan."""
        full = sum(text.price for text in self.texts) / len(self.texts)
        return self.passes + full * (changed + 1) <= PASSES


def read_texts(
    model: PreTrainedModel,
    outline: Outline,
    rungs: Sequence[Rung],
    texts: Sequence[Tensor],
    keep: Sequence[int] = (),
    fitted: Fitted | None = None,
) -> RungSearch:
    """The dense model on these long texts, token ids [T], for a search among rungs.

    `fitted`: linear maps (`mapped_modules`) and constants of folded windows (`fit_folds`), if these are rungs.  Time: a
    forward pass.  Memory: the texts' KV cache.  Raises ArchitectureError if no attention layer takes a window.
    """
    actions = [_action(rung) for rung in rungs]
    read = [FarText(model, outline, ids, actions, fitted) for ids in texts]
    if not read[0].damages:
        raise ArchitectureError(f"no attention layer of {type(model).__name__} takes a window; give --budget alone")
    free = sorted(set(unprotected(outline, ("attn",), "", keep)).intersection(read[0].damages))
    width = read[0].width
    return RungSearch(read, free, actions, width * (width + 1))


def mapped_modules(improver: Improver, layers: Sequence[Layer]) -> Maps:
    """Linear maps for any of these attention layers, fitted in one pass over the improver's calibration windows.

    A repair of the same improver writes the same maps.
    """
    improver.maps(layers)  # kept in the improver's memory

    def maps(layer: Layer) -> Mapping[str, nn.Module]:
        return variant(improver.model, improver.architecture, [layer], improver.maps([layer])).modules()

    return maps


def rung_plan(search: RungSearch, ref: ModelRef, target: Target, **fields: Any) -> Plan:
    """The plan of attention layers that meets the target's budget at its context with the least KL.

    Raises PlanError where the budget cannot be met.
    """
    check_rungs(target.rungs, target.context)
    outline = search.texts[0].outline
    chosen = searched(search, _Weighing(outline, target, _kept_whole(outline, search.texts), search.map_size))
    order = sorted(chosen, key=lambda layer: (chosen[layer].damage, -layer.index))
    actions = {layer: _action(chosen[layer].rung) for layer in order}
    dropped = [layer for layer, action in actions.items() if not isinstance(action, Window)]
    windowed = {layer: action for layer, action in actions.items() if isinstance(action, Window)}
    fields["maps"] = [str(layer) for layer, action in actions.items() if isinstance(action, LinearMap)]
    check_attention_left(outline, dropped)
    fields["metric"] = f"KL of {', '.join(map(str, target.rungs))} at the end of long texts"
    budget = str(parse_budget(target.budget or ""))
    return make_plan(outline, ref, budget, dropped, rungs=windowed, keep=list(target.keep), **fields)


@dataclass(frozen=True)
class _Weighing:
    """Turns costs into options: the budget at its context, the layer that must not be dropped, a map's parameters."""

    outline: Outline
    target: Target
    whole: Layer | None
    map_size: int = 0

    def __call__(self, costs: Mapping[Layer, Mapping[Action, float]]) -> dict[Layer, Option]:
        budget, context = parse_budget(self.target.budget or ""), self.target.context
        options = {
            layer: [
                Option(rung, saved_share(self.outline, layer, rung, budget, context, self.map_size), own[_action(rung)])
                for rung in self.target.rungs
                if isinstance(rung, Windowed) or layer != self.whole
            ]
            for layer, own in costs.items()
        }
        return climb(options, budget.amount)


def searched(search: RungSearch, weigh: Callable[..., dict[Layer, Option]]) -> dict[Layer, Option]:
    costs = search.alone()
    best = weigh(costs)
    search.kl = search.measured(_actions(best))
    search.history.append(search.kl)
    for _ in range(ROUNDS):
        if not search.room(len(best) + len(STEPS)):
            break
        factors = search.beside(_actions(best), costs)
        for step in STEPS:
            scaled = {
                layer: {action: cost * factors[layer] ** step for action, cost in own.items()}
                for layer, own in costs.items()
            }
            found = weigh(scaled)
            if _actions(found) == _actions(best):
                continue
            search.history.append(search.measured(_actions(found)))
            if search.history[-1] < search.kl:
                best, costs, search.kl = found, scaled, search.history[-1]
                break
        else:
            break
    return best


def _actions(chosen: Mapping[Layer, Option]) -> dict[Layer, Action]:
    return {layer: _action(option.rung) for layer, option in chosen.items()}


def _action(rung: Rung) -> Action:
    if isinstance(rung, Windowed):
        return rung.window
    return rung if isinstance(rung, LinearMap) else None


def _kept_whole(outline: Outline, texts: Sequence[FarText]) -> Layer | None:
    """The attention layer with keys that has the largest output; a model keeps one of them."""
    damages = texts[0].damages
    with_keys = [layer for layer in damages if outline.branch(layer).kv]
    return max(with_keys, key=lambda layer: sum(t.damages[layer][None] for t in texts), default=None)
