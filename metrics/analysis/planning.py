"""From scores to a plan, without the model: light enough to answer at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dropformer.metrics.analysis.scores import Scores
from dropformer.prune.packable import choose_packable
from dropformer.prune.plan import Plan, PublishedLists, choose, make_plan


def plan_from(
    scores: Scores | str | Path,
    spec: str,
    keep: Sequence[int] = (),
    published: PublishedLists | None = None,
    packable: bool = False,
) -> Plan:
    """Which layers a drop spec takes, by these scores (or those in a scores.json).

    `packable`: in pairs, so that the pruned model is a stock, shorter one.  Raises PlanError.
    """
    found = scores if isinstance(scores, Scores) else Scores.read(scores)
    similarity = found.similarity()
    cost = None
    if packable:
        layers, cost = choose_packable(found.outline, spec, similarity, keep)
    else:
        layers = choose(found.outline, spec, similarity, keep, published)
    calibration = found.calibration.model_dump() if found.calibration else None
    fields: dict[str, Any] = {
        "keep": list(keep),
        "metric": found.metric,
        "calibration": calibration,
        "packing_cost": cost,
    }
    return make_plan(found.outline, found.model, spec, layers, similarity, **fields)
