"""Open a model and the plan of its draft, and measure both."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from dropformer.eval.draft.evaluate import DraftEvaluation, evaluate_draft
from dropformer.metrics.calibration.settings import Calibration, check_length
from dropformer.metrics.calibration.windows import windows
from dropformer.metrics.repair.base import Repair
from dropformer.prune.block_map import new_name
from dropformer.prune.errors import ModelError, PlanError
from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.load import load
from dropformer.prune.plan import Plan
from dropformer.prune.surgery.surgery import plan_surgery
from dropformer.recipes.opening import open_model
from dropformer.recipes.placement import Placement


def evaluate_pair(model: str, path: Path, text: Calibration, new: int, place: Placement) -> DraftEvaluation:
    """Evaluate the draft of a plan.json with its model; repaired weights are read from the checkpoint that holds it.

    Raises PlanError for a plan of other weights, and for a repaired one without its checkpoint.
    """
    plan, opened = Plan.read(path), open_model(model, None, place)
    if plan.model.fingerprint != opened.ref.fingerprint:
        raise PlanError(f"{path} was made for other weights than {opened.ref.name}; plan this model")
    if opened.tokenizer is None:
        raise ModelError(f"{opened.ref.name} has no tokenizer, so acceptance cannot be measured on text")
    check_length(opened.model.config, text.length, opened.ref.name)
    repair = stored_repair(opened.model, plan, path) if plan.repairs else None
    return evaluate_draft(opened.model, plan, [windows(text, opened.tokenizer)], new, repair)


def stored_repair(dense: PreTrainedModel, plan: Plan, path: Path) -> Repair:
    """The tensors of the checkpoint beside a plan.json that are not the dense model's.  Raises PlanError."""
    if not (path.parent / "config.json").is_file():
        raise PlanError(
            f"{path} is of a repaired draft ({', '.join(plan.repairs)}), whose weights lie in its checkpoint; give the "
            "plan.json in that folder"
        )
    pruned = dict(load(path.parent, dense.dtype, input_device(dense)).named_parameters())
    block_map = plan_surgery(plan.outline, plan.layers, dense, None, plan.rungs).block_map
    found = {}
    for name, own in dense.named_parameters():
        new = new_name(plan.outline, block_map, name)
        if new in pruned and not torch.equal(own, pruned[new]):
            found[name] = pruned[new].detach()
    return Repair(found)
