"""The main job, end to end: fetch, calibrate, score, plan, drop, measure, export, reload, verify, report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from dropformer import api
from dropformer.eval.cost.timing import Setting
from dropformer.eval.quality.output_similarity import OutputSimilarity, output_similarity
from dropformer.eval.quality.perplexity import HELD_OUT
from dropformer.eval.quality.sweep import AT, Sweep, find_cliff, point, with_speed
from dropformer.eval.report.report import (
    Measured,
    Report,
    TextRef,
    card_lines,
    measure_quality,
    measure_speed,
    same_text,
    sizes,
)
from dropformer.metrics.analysis.distributed import rank
from dropformer.metrics.analysis.plots import similarity_by_depth
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.data import calibration_data, default_settings
from dropformer.metrics.calibration.images import PIXELS
from dropformer.metrics.calibration.settings import Calibration, check_length, context_of
from dropformer.metrics.calibration.windows import Windows, windows
from dropformer.metrics.repair.base import Repair
from dropformer.preflight import check_out, default_out
from dropformer.progress import Progress, Silent
from dropformer.prune.architecture import of_images
from dropformer.prune.discovery.inputs import takes_pictures, writes_text
from dropformer.prune.errors import CalibrationError, ModelError, PlanError
from dropformer.prune.files import CopyReport
from dropformer.prune.files.folder import new_files
from dropformer.prune.files.output_paths import check_place
from dropformer.prune.formats.export import Exported, export
from dropformer.prune.formats.export_plan import Written, plan_kept, write_by_plan
from dropformer.prune.formats.record import kv_width
from dropformer.prune.formats.registry import known_format
from dropformer.prune.formats.writing import ExportOptions
from dropformer.prune.plan import Plan
from dropformer.prune.spec import parse_spec
from dropformer.recipes import Recipe
from dropformer.recipes.opening import LoadedModel, Placement, open_model, torch_dtype
from dropformer.recipes.source import short_name
from dropformer.scoring import get_scores, open_to_score
from dropformer.selection import Improvement, given_plan, improved

SWEEP = Setting(prompt=256, new=16)
"""What a sweep times each model at."""


@dataclass(frozen=True)
class Overrides:
    """What the user said about calibration; None leaves the recipe's choice, or builtin."""

    calibration: str | None = None
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    skip_first: int | None = None

    def of(self, recipe: Recipe | None) -> Calibration:
        said = {"name" if k == "calibration" else k: v for k, v in vars(self).items() if v is not None}
        base = api.default_calibration(recipe)
        if "name" in said and said["name"] != base.name:
            base = Calibration()  # the recipe's sizes belong to the recipe's text
        return replace(base, **said)


@dataclass(frozen=True)
class Request:
    """One run of the main job."""

    model: str
    drop: str | None = None
    out: Path | None = None
    keep: tuple[int, ...] = ()
    plan: Path | None = None
    scores: Path | None = None
    revision: str | None = None
    batch_size: int = 1
    calibration: Overrides = field(default_factory=Overrides)
    placement: Placement = field(default_factory=Placement)
    text: str = HELD_OUT.name
    seconds: float = 18.0
    until_stable: str | None = None
    memory: str | None = None
    improvement: Improvement | None = None
    how: ExportOptions = field(default_factory=ExportOptions)
    measure: bool = True


@dataclass(frozen=True)
class Outcome:
    """What the main job made."""

    out: Path
    plan: Plan
    report: Report
    exported: Exported


def make_plan(opened: LoadedModel, request: Request, progress: Progress) -> tuple[Plan, Scores | None]:
    """The plan from a file, from lists (no calibration needed), or from scores."""
    if request.plan:
        plan = given_plan(opened, request)
        if plan.repairs:
            progress.say(plan.lost_repairs(request.plan))
        return plan.unrepaired(), None
    spec = request.drop or ""
    published = opened.recipe.published if opened.recipe else None  # type: ignore[union-attr]
    if all(s.published or s.indices is not None for s in parse_spec(spec)):
        outline = api.outline(opened.model, spec)
        return api.plan_unscored(opened.ref, outline, spec, request.keep, published), None  # type: ignore[arg-type]
    if seen := next((s for s in parse_spec(spec) if of_images(s.stack)), None):
        raise PlanError(
            f"`{seen}` needs scores on images with their texts; name the layers, as in {seen.stack}.{seen.kind}=1,2, "
            "or use dropformer.analyze(model, batches) in Python"
        )
    scores = get_scores(opened, request, progress)
    return api.plan(scores, spec, request.keep, published), scores  # type: ignore[arg-type]


def plan_only(request: Request, progress: Progress | None = None) -> Plan:
    """The plan that `run` would follow."""
    progress = progress or Silent()
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, request.placement, progress.say)
    if request.improvement:
        return improved(opened, request, progress)[0]
    return make_plan(opened, request, progress)[0]


def run(request: Request, progress: Progress | None = None) -> Outcome:
    """Do the whole job.  Raises a DropformerError, and then nothing is left of the output.

    The plan is kept beside the output where a check failed, memory ran out, or choosing it took long.
    """
    progress = progress or Silent()
    budget = request.improvement.budget if request.improvement else None
    out = request.out or default_out(request.model, request.drop or budget, request.plan)
    check_out(out)
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, request.placement, progress.say)
    held_out = _held_out(opened, request)  # a text that is too short is said before anything is measured
    scores, repair = None, None
    if request.improvement:
        plan, repair = improved(opened, request, progress)
    else:
        plan, scores = make_plan(opened, request, progress)
    progress.say(f"dropping {', '.join(map(str, plan.layers))}")
    if any(layer.kind == "attn" and layer.index == 0 for layer in plan.layers):
        progress.say("warning: the attention of block 0 goes; vLLM and llama.cpp cannot load a model without it")
    with plan_kept(plan, out, always=request.improvement is not None):
        chosen = _Chosen(plan, scores, repair)
        report, exported = _carried_out(opened, chosen, out, held_out, request, progress)
    return Outcome(out, plan, report, exported)


@dataclass(frozen=True)
class _Chosen:
    """What to do to the model, and the scores behind it where there are any."""

    plan: Plan
    scores: Scores | None
    repair: Repair | None


def _carried_out(
    opened: LoadedModel, chosen: _Chosen, out: Path, held_out: Windows | None, request: Request, progress: Progress
) -> tuple[Report, Exported]:
    """Drop, measure on the held-out windows, export and verify."""
    plan = chosen.plan
    pruned = api.drop(opened, plan, chosen.repair)
    surgery = api.drop_record(pruned).surgery
    if surgery.note:
        progress.say(f"dropped blocks stay as empty ones: {surgery.note}")
    quality, speed = _measure(opened, pruned, plan, request, held_out, progress)
    made: list[Report] = []

    def finish(folder: Path, copied: CopyReport) -> list[str]:
        kept = pruned if known_format(request.how.format).saves else opened.model
        made.append(_report(opened.model, kept, plan, copied, quality, speed))
        _write_artifacts(folder, made[0], plan, chosen.scores)
        return card_lines(made[0])

    with progress.stage("exporting, reloading and verifying") as tick:
        how = replace(request.how, gguf=opened.file, progress=tick)
        exported = export(pruned, surgery, plan, opened.path, out, how, finish)
    return made[0], exported


def run_from_disk(request: Request, progress: Progress | None = None) -> Written:
    """Choose, repair and write with the blocks' weights read from the files, for a model that exceeds memory.

    Nothing is measured on the result, and nothing of it is loaded again.  Raises a DropformerError.
    """
    from dropformer.metrics.offload.from_disk import open_source_of_blocks
    from dropformer.metrics.offload.process_memory import parse_bytes

    progress, place = progress or Silent(), request.placement
    if place.device_map or place.device not in (None, "cpu"):
        raise ModelError("--memory computes on the CPU; leave out --device and --device-map, or --memory")
    budget = request.improvement.budget if request.improvement else None
    if budget and budget.startswith("measured"):
        raise ModelError(
            "--budget measured times the model, which must be in memory; use decode, or leave out --memory"
        )
    out = request.out or default_out(request.model, request.drop or budget, request.plan)
    check_out(out)
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, place, progress.say, False)
        dtype = torch_dtype(place.dtype or "float32")
        allowed = parse_bytes(request.memory or "")
        blocks = open_source_of_blocks(opened.path, allowed, dtype or "float32", place.trust_remote_code)
    plan, repair = improved(replace(opened, model=cast(Any, blocks.model)), request, progress, blocks)
    progress.say(f"dropping {', '.join(map(str, plan.layers))}")
    with progress.stage("copying", 100) as tick:
        how = replace(request.how, gguf=opened.file, progress=lambda done, total: tick(100 * done // max(1, total), 0))
        return write_by_plan(plan, opened.path, out, how, repair)


def _measure(
    opened: LoadedModel, pruned: Any, plan: Plan, request: Request, held_out: Windows | None, progress: Progress
) -> tuple[Measured, Measured]:
    nothing = Measured({}, {}, {})
    quality = speed = nothing
    if not request.measure:
        return quality, speed
    if not writes_text(pruned):
        return Measured({}, {}, {"outputs": _likeness(opened, pruned, request, progress)}), nothing
    if held_out is not None:
        ids = held_out.ids
        seen = any(same_text(request.text, name) for name in _calibrated_on(opened, plan, request))
        text = TextRef(
            name=request.text, windows=len(ids), length=ids.shape[1], hash=held_out.ref.hash, calibrated_on=seen
        )
        with progress.stage(f"perplexity on {request.text}"):
            quality = measure_quality(opened.model, pruned, held_out, text, plan)
        if request.seconds > 0 and known_format(request.how.format).saves:
            with progress.stage("speed, dense and pruned interleaved"):
                speed = measure_speed(opened.model, pruned, request.seconds)
    return quality, speed


def _held_out(opened: LoadedModel, request: Request) -> Windows | None:
    """The report's text, None where perplexity is not measured.  Raises CalibrationError where there is too little."""
    if not request.measure or opened.tokenizer is None or not writes_text(opened.model):
        return None
    length = min(HELD_OUT.length, context_of(opened.model.config) or HELD_OUT.length)
    try:
        return windows(replace(HELD_OUT, name=request.text, length=length), opened.tokenizer)
    except CalibrationError as error:
        raise CalibrationError(f"--text: {error}") from None


def _calibrated_on(opened: LoadedModel, plan: Plan, request: Request) -> list[str]:
    """The texts that layers were chosen on, or repaired; none where a list names the layers."""
    chosen = [str(plan.calibration["name"])] if plan.calibration else []
    repaired = request.calibration.of(opened.recipe).name.split(",") if request.improvement else []
    return chosen + repaired


def _likeness(opened: LoadedModel, pruned: Any, request: Request, progress: Progress) -> OutputSimilarity | None:
    """How like the outputs are on held-out text, or on images like those calibrated on; None without either."""
    name = (request.calibration.calibration or PIXELS) if takes_pictures(pruned) else request.text
    if opened.tokenizer is None and not takes_pictures(pruned):
        return None
    length = min(HELD_OUT.length, request.calibration.length or HELD_OUT.length)
    chosen = replace(default_settings(pruned, replace(HELD_OUT, length=length)), name=name)
    with progress.stage(f"outputs on {name}"):
        data = calibration_data(pruned, opened.tokenizer, opened.path, chosen)
        return output_similarity(opened.model, pruned, data.batches(1), name)


def _report(dense: Any, pruned: Any, plan: Plan, copied: CopyReport, quality: Measured, speed: Measured) -> Report:
    width = kv_width(copied.bytes_before, plan.savings.parameters)
    before = sizes(dense, copied.bytes_before, width)
    after = sizes(pruned, copied.bytes_after, width)
    return Report(
        model=plan.model,
        spec=plan.spec,
        dropped=plan.dropped(),
        dense={**before, **quality.dense, **speed.dense},  # type: ignore[arg-type]
        pruned={**after, **quality.pruned, **speed.pruned},  # type: ignore[arg-type]
        **quality.fields,
        **speed.fields,
    )


def _write_artifacts(folder: Path, report: Report, plan: Plan, scores: Scores | None) -> None:
    report.portable().write(folder / "report.json")
    plan.portable().write(folder / "plan.json")
    if scores:
        scores = scores.portable()
        scores.write(folder / "scores.json")
        similarity_by_depth(scores, folder / "similarity.png", plan.outline.branch_layers(plan.layers))


def analyze(request: Request, progress: Progress | None = None) -> tuple[Scores, Path]:
    """Score a model and write scores.json and similarity.png into a folder; the folder too.

    Of several processes launched together only the first writes.
    """
    progress = progress or Silent()
    out = request.out or Path(f"{short_name(request.model)}-scores")
    check_place(out)
    opened = open_to_score(request, progress)
    scores = get_scores(opened, request, progress)
    if rank() == 0:
        with new_files(out) as folder:
            scores.write(folder / "scores.json")
            similarity_by_depth(scores, folder / "similarity.png")
    return scores, out


def sweep(
    request: Request, kind: str, counts: list[int], shape: tuple[int, int], progress: Progress, speed: bool = False
) -> Sweep:
    """Measure every number of drops of a kind, most redundant first, on windows of the shape (N, T); dense first.

    With `speed` all of them are timed too, interleaved.
    """
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, request.placement, progress.say)
    if not writes_text(opened.model):
        raise ModelError(f"a sweep measures perplexity, and {request.model} is no causal language model; prune it")
    check_length(opened.model.config, max(shape[1], SWEEP.prompt + SWEEP.new if speed else 0), opened.ref.name)
    scores = get_scores(opened, request, progress)
    plans = [api.plan(scores, f"{kind}:{count}", request.keep) for count in counts if count]
    data = windows(Calibration(request.text, *shape, seed=HELD_OUT.seed), opened.tokenizer)
    models = [opened.model, *(api.drop(opened, plan) for plan in plans)]
    setting = SWEEP if speed else AT
    points = []
    with progress.stage(f"perplexity on {request.text}", len(models)) as tick:
        for model, layers in zip(models, [[], *(plan.layers for plan in plans)], strict=True):
            points.append(point(opened.model, model, layers, data.ids, setting, data.partly_scored))
            tick(len(points), len(points) * data.ids.numel())
    if speed:
        with progress.stage(f"speed, {len(models)} models interleaved"):
            points = with_speed(points, models, setting)
    return Sweep(
        model=opened.ref, of=kind, text=data.ref.model_dump(), setting=str(setting), points=points,
        cliff=find_cliff(points),
    )  # fmt: skip
