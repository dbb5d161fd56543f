"""The rung of each layer, by least KL per unit saved, until a budget is met: `--budget ... --rungs ...`.

A multiple-choice knapsack by increments: a layer may move from its current rung to any that saves more, and the step
of least added KL per unit saved is taken.  With W = window and D = drop, saving 0.9 and 1.0:

    layer 3: W costs 0.01, D 0.50      first W of 3 (0.011 a unit), then W of 7 (0.022),
    layer 7: W costs 0.02, D 0.30      then D of 7 (2.8 a unit more), then D of 3 (4.9)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dropformer.metrics.search.budget import Budget
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import Outline
from dropformer.prune.rungs.agent import ThroughAgents
from dropformer.prune.rungs.linear import LinearMap
from dropformer.prune.rungs.registry import Rung
from dropformer.prune.rungs.window import Windowed
from dropformer.prune.window import Window

MOST = 1e-12  # rounding of shares


@dataclass(frozen=True)
class Option:
    """A rung for a layer: the share of the budget's quantity that it saves, and its damage in KL."""

    rung: Rung
    saves: float
    damage: float


def check_rungs(rungs: Iterable[Rung], context: int) -> list[Window]:
    """The windows among the rungs.  Raises PlanError for rungs that a budget cannot choose among."""
    rungs = list(rungs)
    if agents := next((rung for rung in rungs if isinstance(rung, ThroughAgents)), None):
        raise PlanError(
            f"--rungs takes no {agents}: agents are for encoders, and a budget chooses by text that a model writes; "
            f"number them, as in --drop agent:4@{agents.agents}"
        )
    windows = [rung.window for rung in rungs if isinstance(rung, Windowed)]
    if not windows:
        raise PlanError(
            "--rungs without a window is what --budget does alone (with --repair linear for linear maps); add one, as "
            "in --rungs drop,linear,window:512+4"
        )
    for window in windows:
        if window.width + window.sinks >= context:
            raise PlanError(f"a window of {window} saves nothing at {context:,} tokens; give a larger --context")
    return windows


def saved_share(outline: Outline, layer: Layer, rung: Rung, budget: Budget, context: int, map_size: int = 0) -> float:
    """The share that a rung saves of the KV cache at `context` tokens, the parameters, or the bytes of a decoded token.

    `map_size`: parameters of a linear map; without it one is taken to have as many as its layer.  Raises PlanError for
    `measured`, and for a model without what the budget counts.
    """
    if budget.what == "measured":
        raise PlanError(f"budget `{budget}` times layers, and rungs are told by bytes: use decode, kv or params")
    weights, cache = {"params": (1, 0), "kv": (0, 1), "decode": (1, 1)}[budget.what]
    whole = weights * outline.parameters + cache * outline.kv_at(context)
    if not whole:
        raise PlanError(f"budget `{budget}` counts the KV cache, and this model has none; use params:-20%")
    branch, owned = outline.branch(layer), outline.dropped_parameters([layer])
    freed = cache * branch.kv * max(0, branch.held(context) - rung.held(context))
    left = map_size if map_size and isinstance(rung, LinearMap) else rung.parameters(owned)
    return (weights * (owned - left) + freed) / whole


def climb(options: Mapping[Layer, Sequence[Option]], amount: float) -> dict[Layer, Option]:
    """A rung per changed layer, together saving `amount`.

    The last step may overshoot, so layers return to gentler rungs as long as the budget is met, most damage first.
    Ties: the deeper layer.  Raises PlanError if all layers save too little.
    """
    chosen: dict[Layer, Option] = {}
    while _saved(chosen) < amount - MOST:
        steps = [
            (_price(option, chosen.get(layer)), -layer.index, str(layer), layer, option)
            for layer, known in options.items()
            for option in known
            if option.saves > _saves(chosen.get(layer)) + MOST
        ]
        if not steps:
            raise PlanError(
                f"the rungs save {_saved(chosen):.1%} at most, and the budget asks for {amount:.1%}; ask for less, "
                "or add a rung that keeps less, as in --rungs drop,window:256+4"
            )
        *_, layer, option = min(steps, key=lambda step: step[:3])
        chosen[layer] = option
    return _gentler(options, chosen, amount)


def _gentler(
    options: Mapping[Layer, Sequence[Option]], chosen: dict[Layer, Option], amount: float
) -> dict[Layer, Option]:
    while True:
        spare = _saved(chosen) - amount + MOST
        back: list[tuple[float, Layer, Option | None]] = []
        for layer, now in chosen.items():
            for option in (None, *options[layer]):
                less = now.damage - (option.damage if option else 0.0)
                if less > 0 and now.saves - _saves(option) <= spare:
                    back.append((less, layer, option))
        if not back:
            return chosen
        _, layer, option = max(back, key=lambda step: step[0])
        chosen = {key: value for key, value in chosen.items() if key != layer} | ({layer: option} if option else {})


def _price(option: Option, now: Option | None) -> float:
    """Added damage per additional unit saved."""
    return (option.damage - (now.damage if now else 0.0)) / (option.saves - _saves(now))


def _saves(option: Option | None) -> float:
    return option.saves if option else 0.0


def _saved(chosen: Mapping[Layer, Option]) -> float:
    return sum(option.saves for option in chosen.values())
