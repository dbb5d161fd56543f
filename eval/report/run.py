"""Open models, evaluate them side by side, and write report.json and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dropformer.eval.quality.sweep import Sweep
from dropformer.eval.report.evaluation import Candidate, Evaluation, EvaluationOptions, evaluate
from dropformer.eval.report.page import Picture, html
from dropformer.eval.report.prepare import labels
from dropformer.metrics.analysis.distributed import own_device
from dropformer.progress import Progress
from dropformer.prune.plan import Plan
from dropformer.recipes.opening import LoadedModel, open_model
from dropformer.recipes.placement import Placement


@dataclass(frozen=True)
class EvaluationRun:
    """What was found, and the pictures of similarity by depth that lie beside the checkpoints."""

    found: Evaluation
    pictures: list[Picture]

    def write(self, folder: Path, sweep: Path | None = None) -> None:
        """report.json and report.html, with a sweep's figures where its file is given."""
        self.found.write(folder / "report.json")
        page = html(self.found, self.pictures, Sweep.read(sweep) if sweep else None)
        (folder / "report.html").write_text(page, encoding="utf-8")


def evaluate_models(
    names: Sequence[str], options: EvaluationOptions, placement: Placement, progress: Progress
) -> EvaluationRun:
    """Evaluate whatever `--model` takes; the first is the dense model.  Raises as `open_model` and `evaluate`."""
    if not placement.device_map:
        placement = replace(placement, device=own_device(placement.device))
    opened = [open_model(name, None, placement, progress.say) for name in names]
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


def plan_of(pruned: LoadedModel, dense: LoadedModel) -> Plan | None:
    """The plan beside a checkpoint's weights, if it was made from this dense model."""
    path = pruned.path / "plan.json"
    plan = Plan.read(path) if path.is_file() else None
    return plan if plan and plan.model.fingerprint == dense.ref.fingerprint else None
