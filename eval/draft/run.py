"""Open a model and the plan of its draft, and measure both."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dropformer.eval.draft.evaluate import DraftEvaluation, evaluate_draft
from dropformer.metrics.calibration.data import text_windows
from dropformer.metrics.calibration.generated import Writer
from dropformer.metrics.calibration.settings import Calibration, check_length
from dropformer.metrics.repair.base import Repair
from dropformer.prune.block_map import map_blocks, new_name
from dropformer.prune.errors import ModelError, PlanError
from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.load import load
from dropformer.prune.plan import Plan
from dropformer.prune.samples.inputs import writes_text
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
    if not writes_text(opened.model):
        raise ModelError(f"{opened.ref.name} writes no text token by token, so nothing is drafted for it")
    if opened.tokenizer is None:
        raise ModelError(f"{opened.ref.name} has no tokenizer, so acceptance cannot be measured on text")
    check_length(opened.model.config, text.length, opened.ref.name)
    repair = stored_repair(opened.model, plan, path, place.trust_remote_code) if plan.repairs else None
    data = text_windows(text, Writer(opened.model, opened.tokenizer, opened.ref.fingerprint))
    return evaluate_draft(opened.model, plan, [data], new, repair)


def stored_repair(dense: PreTrainedModel, plan: Plan, path: Path, trust_remote_code: bool = False) -> Repair:
    """The tensors of the checkpoint beside a plan.json that are not the dense model's.  Raises PlanError."""
    if not (path.parent / "config.json").is_file():
        raise PlanError(
            f"{path} is of a repaired draft ({', '.join(plan.repairs)}), whose weights lie in its checkpoint; give the "
            "plan.json in that folder"
        )
    model = load(path.parent, dense.dtype, input_device(dense), trust_remote_code=trust_remote_code)
    held = dict(model.named_parameters())
    names = _names(dense, plan, held)
    found = {
        name: held[names[name]].detach()
        for name, own in dense.named_parameters()
        if name in names and not torch.equal(own, held[names[name]])
    }
    if not found:
        raise PlanError(f"{path.parent} holds no repaired weights of {path}; give the plan.json in the draft's folder")
    return Repair(found)


def _names(dense: PreTrainedModel, plan: Plan, held: Collection[str]) -> dict[str, str]:
    """The dense model's names of the kept parameters -> a checkpoint's, whose blocks stayed (as with zeros) or moved.

    Raises PlanError for the checkpoint of another model.
    """
    still = map_blocks(plan.outline, plan.layers, False, rungs=plan.rungs)
    for block_map in (still, plan_surgery(plan.outline, plan.layers, dense, None, plan.rungs).block_map):
        pairs = ((name, new_name(plan.outline, block_map, name)) for name, _ in dense.named_parameters())
        found = {name: new for name, new in pairs if new}
        if set(found.values()) <= set(held):
            return found
    raise PlanError("the checkpoint beside the plan.json is of another model; give the plan.json in the draft's folder")
