"""Follow a plan on a model's files only.  Does not import torch if blocks keep their indices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dropformer.progress import Progress, Silent, Tick
from dropformer.prune.errors import PlanError
from dropformer.prune.formats.export_plan import write_by_plan
from dropformer.prune.formats.writing import Exported, ExportOptions
from dropformer.prune.plan import Plan
from dropformer.recipes.source import open_source


def follow_plan(
    path: Path | None,
    model: str,
    out: Path,
    how: ExportOptions,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Apply a plan by copying byte ranges, without a model in memory.  Raises as `write_by_plan`."""
    progress = progress or Silent()
    if path is None:
        raise PlanError("there is no plan to follow; give one with --plan")
    plan = Plan.read(path)
    source = open_source(model, revision, progress.say)
    if plan.repairs:
        progress.say(plan.lost_repairs(path))
    with progress.stage("copying", 100) as tick:
        return write_by_plan(plan, source.path, out, in_percent(how, source.file, tick))


def in_percent(how: ExportOptions, gguf: Path | None, tick: Tick) -> ExportOptions:
    """The export options, with progress in percent."""
    return replace(how, gguf=gguf, progress=lambda done, total: tick(100 * done // max(1, total), 0))
