"""From scores to a plan, without the model: light enough to answer at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dropformer.metrics.analysis.scores import Scores
from dropformer.prune.architecture import Layer
from dropformer.prune.choosing import PublishedLists, choose_forms, choose_windows
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import Outline
from dropformer.prune.packable import choose_packable
from dropformer.prune.plan import Plan, make_plan
from dropformer.prune.rungs.agent import Agents
from dropformer.prune.spec import parse_spec, without_windows
from dropformer.prune.window import Window


def plan_from(
    scores: Scores | str | Path,
    spec: str,
    keep: Sequence[int] = (),
    published: PublishedLists | None = None,
    packable: bool = False,
    losses: Mapping[Layer, float] | None = None,
) -> Plan:
    """Which layers a drop spec takes, by these scores (or those in a scores.json).

    `packable`: in pairs, so that the pruned model is a stock, shorter one.  `losses`: what a window or agents take from
    each attention layer (`window_loss`, `agent_loss`), by which they are given.  Raises PlanError.
    """
    found = scores if isinstance(scores, Scores) else Scores.read(scores)
    similarity = found.similarity()
    cost, maps = None, list[Layer]()
    drops = without_windows(spec)
    if packable:
        layers, cost = choose_packable(found.outline, spec, similarity, keep)
    else:
        layers, maps = choose_forms(found.outline, drops, similarity, keep, published) if drops else ([], [])
    windows = spec_windows(found.outline, spec, layers, losses, keep)
    calibration = found.calibration.model_dump() if found.calibration else None
    fields: dict[str, Any] = {
        "keep": list(keep),
        "metric": found.metric,
        "calibration": calibration,
        "packing_cost": cost,
        "maps": [str(layer) for layer in maps],
    }
    return make_plan(found.outline, found.model, spec, layers, similarity, windows, **fields)


def spec_windows(
    outline: Outline,
    spec: str,
    layers: Sequence[Layer],
    losses: Mapping[Layer, float] | None = None,
    keep: Sequence[int] = (),
) -> dict[Layer, Window | Agents]:
    """The windows and agents of a spec, least loss first.  Raises PlanError for a number of them without losses."""
    counted = next((s for s in parse_spec(spec) if s.rung and s.indices is None), None)
    if counted and losses is None:
        raise PlanError(
            f"`{counted}` is ranked by what it takes from each layer, which only the model tells: use "
            f"`prune --model ... --drop {counted}`, or name the layers as in {counted.kind}=3,7@{counted.rung}"
        )
    ranking = {layer: -loss for layer, loss in (losses or {}).items()}
    return choose_windows(outline, spec, layers, ranking, keep)
