"""Open models, evaluate them side by side, and write report.json and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from dropformer.eval.quality.sweep import Sweep
from dropformer.eval.report.evaluation import Candidate, Evaluation, EvaluationOptions, evaluate
from dropformer.eval.report.page import Picture, html
from dropformer.eval.report.prepare import labels
from dropformer.metrics.analysis.distributed import own_device
from dropformer.metrics.offload.process_memory import shown
from dropformer.progress import Progress
from dropformer.prune.files.config_json import read_config
from dropformer.prune.files.folder import new_files
from dropformer.prune.loading.device import input_device
from dropformer.prune.plan import Plan
from dropformer.prune.surgery.views import share_equal
from dropformer.recipes import open_source
from dropformer.recipes.opening import LoadedModel, open_model
from dropformer.recipes.placement import Placement


@dataclass(frozen=True)
class EvaluationRun:
    """An evaluation, and the plots of similarity by depth found beside the checkpoints."""

    found: Evaluation
    pictures: list[Picture]

    def write(self, folder: Path, sweep: Path | None = None) -> None:
        """Write report.json and report.html together, with a sweep's figures if its file is given."""
        page = html(self.found, self.pictures, Sweep.read(sweep) if sweep else None)
        with new_files(folder) as made:
            self.found.write(made / "report.json")
            (made / "report.html").write_text(page, encoding="utf-8")


def evaluate_models(
    names: Sequence[str], options: EvaluationOptions, placement: Placement, progress: Progress
) -> EvaluationRun:
    """Evaluate models by name; the first is the dense model.  Raises as `open_model` and `evaluate`."""
    if not placement.device_map:
        placement = replace(placement, device=own_device(placement.device))
    opened = opened_together(names, placement, progress)
    models = [
        Candidate(label, one.model, one.tokenizer, plan_of(one, opened[0]))
        for label, one in zip(labels(names), opened, strict=True)
    ]
    pictures = [
        (one.path / "similarity.png", f"{model.name}: similarity by depth, crosses mark the dropped layers.")
        for one, model in zip(opened, models, strict=True)
        if (one.path / "similarity.png").is_file()
    ]
    return EvaluationRun(evaluate(models, options, progress), pictures)


def opened_together(names: Sequence[str], placement: Placement, progress: Progress) -> list[LoadedModel]:
    """Open models; each shares the weights that equal the first model's bit for bit.

    On a GPU the others are loaded into host memory first, so that the device never holds a shared weight twice.  With
    a device map or quantized weights, equal weights are held twice while a model is loaded.
    """
    dense = open_model(names[0], None, placement, progress.say)
    found, device = [dense], input_device(dense.model)
    for name in names[1:]:
        near = device.type == "cpu" or placement.device_map or _quantized(name, progress)
        place = placement if near else replace(placement, device="cpu", dtype=placement.dtype or "auto")
        one = open_model(name, None, place, progress.say)
        if shared := share_equal(one.model, dense.model):
            progress.say(f"{shown(shared)} of {name}'s weights equal those of {names[0]} and are held once")
        if not near:
            nn.Module.to(one.model, device)
        found.append(one)
    return found


def _quantized(name: str, progress: Progress) -> bool:
    return bool(read_config(open_source(name, None, progress.say).path).get("quantization_config"))


def plan_of(pruned: LoadedModel, dense: LoadedModel) -> Plan | None:
    """The plan beside a checkpoint's weights, if it was made from this dense model."""
    path = pruned.path / "plan.json"
    plan = Plan.read(path) if path.is_file() else None
    return plan if plan and plan.model.fingerprint == dense.ref.fingerprint else None
