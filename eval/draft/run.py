"""Open a model and the plan of its draft, and measure both."""

from __future__ import annotations

from pathlib import Path

from dropformer.eval.draft.evaluate import DraftEvaluation, evaluate_draft
from dropformer.metrics.calibration.settings import Calibration, check_length
from dropformer.metrics.calibration.windows import windows
from dropformer.prune.errors import ModelError, PlanError
from dropformer.prune.plan import Plan
from dropformer.recipes.opening import open_model
from dropformer.recipes.placement import Placement


def evaluate_pair(model: str, path: Path, text: Calibration, new: int, place: Placement) -> DraftEvaluation:
    """Evaluate the draft of a plan.json with its model.  Raises PlanError for a plan of other weights."""
    plan, opened = Plan.read(path), open_model(model, None, place)
    if plan.model.fingerprint != opened.ref.fingerprint:
        raise PlanError(f"{path} was made for other weights than {opened.ref.name}; plan this model")
    if opened.tokenizer is None:
        raise ModelError(f"{opened.ref.name} has no tokenizer, so acceptance cannot be measured on text")
    check_length(opened.model.config, text.length, opened.ref.name)
    return evaluate_draft(opened.model, plan, [windows(text, opened.tokenizer)], new)
