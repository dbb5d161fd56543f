"""When a model's own draft pays, from its config alone: the cost of a draft step, and speed-up by acceptance."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dropformer.eval.cost.estimate import decoder_windows
from dropformer.eval.cost.hardware import Hardware
from dropformer.eval.cost.model_cost import ModelCost
from dropformer.eval.cost.roofline import Workload
from dropformer.eval.draft.cost import Steps
from dropformer.metrics.draft.formula import PAYS, best, needed_acceptance
from dropformer.prune.architecture import BRANCH_KINDS, Layer
from dropformer.prune.choosing import PublishedLists, choose_forms, choose_windows
from dropformer.prune.errors import PlanError
from dropformer.prune.spec import folds, parse_spec, without_windows

ACCEPTANCES = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)


@dataclass(frozen=True)
class DraftEstimate:
    """cost: a draft step over a dense step; curve: acceptance -> (drafted tokens, speed-up).

    needed: the least acceptance that pays, None if none does.
    """

    spec: str
    hardware: str
    context: int
    batch: int
    cost: float
    curve: dict[float, tuple[int, float]]
    needed: float | None

    def to_json(self) -> str:
        return json.dumps(vars(self), indent=1)

    def lines(self) -> list[str]:
        """Lines for the terminal."""
        pays = f"pays from an acceptance of {self.needed:.2f} on" if self.needed else "pays at no acceptance"
        lines = [
            f"{self.spec} as the model's own draft on {self.hardware}, {self.context:,} tokens, batch {self.batch}",
            f"a draft step costs {self.cost:.3f} of a dense step; {pays} (speed-up {PAYS})",
            "acceptance  drafted  speed-up",
        ]
        return [*lines, *(f"{a:10.2f}  {g:7}  {gives:8.2f}" for a, (g, gives) in self.curve.items())]


def draft_estimate(
    cost: ModelCost, spec: str, workload: Workload, device: Hardware, published: PublishedLists | None = None
) -> DraftEstimate:
    """The estimate of a draft by its drop spec; a count takes the deepest layers.  Raises PlanError.

    `published`: a recipe's lists.

    In a verifying pass weights and cache are read once for all drafted tokens; FLOPs are counted per token.
    """
    kinds = ("block", *BRANCH_KINDS)
    depth: dict[Layer, float] = {layer: layer.index for kind in kinds for layer in cost.outline.layers(kind)}
    if any(selector.kind == "linear" or folds(selector) for selector in parse_spec(spec)):
        raise PlanError(
            f"`{spec}`: a draft shares all weights with its dense model, so it has neither linear maps nor folded "
            "sinks; drop layers, or give windows such as 256+4"
        )
    drops = without_windows(spec)
    layers = choose_forms(cost.outline, drops, depth, published=published)[0] if drops else []
    windows = decoder_windows(choose_windows(cost.outline, spec, layers, depth))
    steps = Steps(cost, device, workload)
    c = steps.draft(layers, windows)
    curve = {a: best(a, c, steps.verify) for a in ACCEPTANCES}
    least = needed_acceptance(c, PAYS, steps.verify)
    return DraftEstimate(spec, device.name, workload.context, workload.batch, c, curve, least)
