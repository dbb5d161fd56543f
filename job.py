"""The main job, end to end: fetch, calibrate, score, plan, drop, measure, export, reload, verify, report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from dropformer import api
from dropformer.eval.cost.timing import Setting
from dropformer.eval.draft.choose import DraftFound, choose_draft
from dropformer.eval.quality.output_similarity import OutputSimilarity, output_similarity
from dropformer.eval.quality.perplexity import HELD_OUT, tokens_read
from dropformer.eval.quality.sweep import AT, Sweep, find_cliff, point, with_speed
from dropformer.eval.report import report as reports
from dropformer.metrics.analysis.distributed import rank
from dropformer.metrics.analysis.plots import similarity_by_depth
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.data import calibration_data, default_settings, text_windows
from dropformer.metrics.calibration.images import PIXELS
from dropformer.metrics.calibration.settings import Calibration, check_length, context_of
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.repair.base import Repair
from dropformer.progress import Progress, Silent
from dropformer.prune.architecture import of_images
from dropformer.prune.errors import CalibrationError, ModelError, PlanError
from dropformer.prune.files import CopyReport
from dropformer.prune.files.folder import new_files
from dropformer.prune.files.output_paths import check_place
from dropformer.prune.formats.export import Exported, export
from dropformer.prune.formats.export_plan import Written, plan_kept, write_by_plan
from dropformer.prune.formats.registry import FORMATS
from dropformer.prune.loading.load import usable_device
from dropformer.prune.plan import Plan
from dropformer.prune.samples.inputs import takes_pictures, writes_text
from dropformer.prune.spec import parse_spec
from dropformer.prune.window import CONTEXT
from dropformer.recipes.follow import in_percent
from dropformer.recipes.opening import LoadedModel, open_model, torch_dtype
from dropformer.request import Request
from dropformer.scoring import draft_windows, get_scores, losses_by_window, open_to_score, plan_of_rungs, writer
from dropformer.selection import given_plan, improved
from dropformer.validate import check_empty

SWEEP = Setting(prompt=256, new=16)
"""What a sweep times each model at."""


@dataclass(frozen=True)
class Outcome:
    """What the main job made."""

    out: Path
    plan: Plan
    report: reports.Report
    exported: Exported


def make_plan(opened: LoadedModel, request: Request, progress: Progress) -> tuple[Plan, Scores | None]:
    """The plan from a file, from lists (no calibration needed), or from scores."""
    if path := request.selection.plan:
        plan = given_plan(opened, path)
        if plan.repairs:
            progress.say(plan.lost_repairs(path))
        return plan.unrepaired(), None
    if made := plan_of_rungs(opened, request, progress):
        return made, None
    spec, keep = request.target.spec, request.target.keep
    published = opened.recipe.published if opened.recipe else None
    if all(s.published or s.window or s.indices is not None for s in parse_spec(spec)):
        outline = api.outline(opened.model, spec)
        losses = losses_by_window(opened, request, outline, progress)
        return api.plan_unscored(opened.ref, outline, spec, keep, published, losses), None
    if seen := next((s for s in parse_spec(spec) if of_images(s.stack)), None):
        raise PlanError(
            f"`{seen}` needs scores on images with their texts; name the layers, as in {seen.stack}.{seen.kind}=1,2, "
            "or use dropformer.analyze(model, batches) in Python"
        )
    scores = get_scores(opened, request, progress)
    losses = losses_by_window(opened, request, scores.outline, progress)
    return api.plan(scores, spec, keep, published, losses=losses), scores


def plan_only(request: Request, progress: Progress | None = None) -> Plan:
    """The plan that `run` would follow."""
    progress = progress or Silent()
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, request.placement, progress.say)
    if request.selection.strategy:
        return improved(opened, request, progress, plan=plan_of_rungs(opened, request, progress))[0]
    return make_plan(opened, request, progress)[0]


def draft(request: Request, progress: Progress | None = None) -> tuple[DraftFound, Outcome | None]:
    """Find the model's own draft, and write it where it pays or was asked for anyway.  Raises a DropformerError."""
    progress, options = progress or Silent(), request.draft
    assert options is not None
    if not request.dry_run:
        check_empty(request.folder)
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, request.placement, progress.say)
    data = draft_windows(opened, request.calibration, options, progress)
    found = choose_draft(opened, options, data, request.target.keep, api.outline(opened.model), progress)
    if request.dry_run or not (found.pays or options.anyway):
        return found, None
    with plan_kept(found.plan, request.folder, always=True):
        held_out, chosen = _held_out(opened, request, progress), _Chosen(found.plan, None, None)
        report, exported = _carried_out(opened, chosen, request.folder, held_out, request, progress)
    return found, Outcome(request.folder, found.plan, report, exported)


def run(request: Request, progress: Progress | None = None) -> Outcome:
    """Do the whole job.  Raises a DropformerError, and then nothing is left of the output.

    The plan is kept beside the output where a check failed, memory ran out, or choosing it took long.
    """
    progress = progress or Silent()
    out = request.folder
    check_empty(out)
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, request.placement, progress.say)
    held_out = _held_out(opened, request, progress)  # a text that is too short is said before anything is measured
    scores, repair = None, None
    if request.selection.strategy:
        plan, repair = improved(opened, request, progress, plan=plan_of_rungs(opened, request, progress))
    else:
        plan, scores = make_plan(opened, request, progress)
    if plan.layers:
        progress.say(f"dropping {', '.join(map(str, plan.layers))}")
    if plan.windows:
        progress.say("windows: " + ", ".join(f"{layer}@{window}" for layer, window in plan.windows.items()))
        progress.say(f"KV cache at {CONTEXT:,} tokens: {plan.kv_share(CONTEXT):.0%} of the dense model's")
    if any(layer.kind == "attn" and layer.index == 0 for layer in plan.layers):
        progress.say("warning: the attention of block 0 is dropped; vLLM and llama.cpp cannot load a model without it")
    with plan_kept(plan, out, always=request.selection.strategy is not None):
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
) -> tuple[reports.Report, Exported]:
    """Drop, measure on the held-out windows, export and verify."""
    plan = chosen.plan
    pruned = api.drop(opened, plan, chosen.repair)
    surgery = api.drop_record(pruned).surgery
    if surgery.note:
        progress.say(f"dropped blocks stay as empty ones: {surgery.note}")
    quality, speed = _measure(opened, pruned, plan, request, held_out, progress)
    made: list[reports.Report] = []

    def finish(folder: Path, copied: CopyReport) -> list[str]:
        kept = pruned if FORMATS[request.export.format].saves else opened.model
        made.append(reports.report_of((opened.model, kept), plan, copied, quality, speed, chosen.repair))
        reports.write_artifacts(folder, made[0], plan, chosen.scores)
        return reports.card_lines(made[0])

    with progress.stage("exporting, reloading and verifying") as tick:
        how = replace(request.export, gguf=opened.file, progress=tick)
        exported = export(pruned, surgery, plan, opened.path, out, how, finish)
    return made[0], exported


def run_from_disk(request: Request, progress: Progress | None = None) -> Written:
    """Choose, repair and write with the blocks' weights read from the files, for a model that exceeds memory.

    Nothing is measured on the result, and nothing of it is loaded again.  Raises a DropformerError.
    """
    from dropformer.metrics.blockwise.from_disk import open_source_of_blocks
    from dropformer.metrics.offload.process_memory import parse_bytes

    progress, place = progress or Silent(), request.placement
    if place.device_map:
        raise ModelError("--memory brings the weights block by block itself; leave out --device-map, or --memory")
    budget = request.target.budget
    if budget and budget.startswith("measured"):
        raise ModelError(
            "--budget measured times the model, which must be in memory; use decode, or leave out --memory"
        )
    check_empty(request.folder)
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, place, progress.say, False)
        dtype, device = torch_dtype(place.computes_in(opened.path)), usable_device(place.device)
        allowed = parse_bytes(request.scoring.memory or "")
        blocks = open_source_of_blocks(opened.path, allowed, dtype or "float32", place.trust_remote_code, device)
    plan, repair = improved(replace(opened, model=cast(Any, blocks.model)), request, progress, blocks)
    progress.say(f"dropping {', '.join(map(str, plan.layers))}")
    with progress.stage("copying", 100) as tick:
        return write_by_plan(plan, opened.path, request.folder, in_percent(request.export, opened.file, tick), repair)


def _measure(
    opened: LoadedModel, pruned: Any, plan: Plan, request: Request, held_out: Windows | None, progress: Progress
) -> tuple[reports.Measured, reports.Measured]:
    nothing = reports.Measured({}, {}, {})
    quality = speed = nothing
    if not request.measures:
        return quality, speed
    if not writes_text(pruned):
        return reports.Measured({}, {}, {"outputs": _likeness(opened, pruned, request, progress)}), nothing
    if held_out is not None:
        ids = held_out.ids
        seen = any(reports.same_text(request.report.text, name) for name in _calibrated_on(opened, plan, request))
        text = reports.TextRef(
            name=request.report.text, windows=len(ids), length=ids.shape[1], hash=held_out.ref.hash, calibrated_on=seen
        )
        with progress.stage(f"perplexity on {text.name}{tokens_read(pruned, held_out.ids, held_out.partly_scored)}"):
            quality = reports.measure_quality(opened.model, pruned, held_out, text, plan)
        if request.report.seconds > 0 and FORMATS[request.export.format].saves:
            with progress.stage("speed, dense and pruned interleaved"):
                speed = reports.measure_speed(opened.model, pruned, request.report.seconds)
    return quality, speed


def _held_out(opened: LoadedModel, request: Request, progress: Progress) -> Windows | None:
    """The report's text, None where perplexity is not measured.  Raises CalibrationError where there is too little."""
    if not request.measures or opened.tokenizer is None or not writes_text(opened.model):
        return None
    length = min(HELD_OUT.length, context_of(opened.model.config) or HELD_OUT.length)
    try:
        return text_windows(replace(HELD_OUT, name=request.report.text, length=length), writer(opened, progress))
    except CalibrationError as error:
        raise CalibrationError(f"--text: {error}") from None


def _calibrated_on(opened: LoadedModel, plan: Plan, request: Request) -> list[str]:
    """The texts that layers were chosen on, or repaired; none where a list names the layers."""
    chosen = str(plan.calibration["name"]).split(",") if plan.calibration else []
    repaired = request.calibration.of(opened.recipe).name.split(",") if request.selection.strategy else []
    return chosen + repaired


def _likeness(opened: LoadedModel, pruned: Any, request: Request, progress: Progress) -> OutputSimilarity | None:
    """How like the outputs are on held-out text, or on images like those calibrated on; None without either."""
    name = next(iter(request.calibration.texts), PIXELS) if takes_pictures(pruned) else request.report.text
    if opened.tokenizer is None and not takes_pictures(pruned):
        return None
    length = min(HELD_OUT.length, request.calibration.length or HELD_OUT.length)
    chosen = replace(default_settings(pruned, replace(HELD_OUT, length=length)), name=name)
    with progress.stage(f"outputs on {name}"):
        data = calibration_data(pruned, opened.tokenizer, opened.path, chosen)
        return output_similarity(opened.model, pruned, data.batches(1), name)


def analyze(request: Request, progress: Progress | None = None) -> Scores:
    """Score a model and write scores.json and similarity.png into the request's folder.

    Of several processes launched together only the first writes.
    """
    progress = progress or Silent()
    check_place(request.folder)
    opened = open_to_score(request, progress)
    scores = get_scores(opened, request, progress)
    if rank() == 0:
        with new_files(request.folder) as folder:
            scores.write(folder / "scores.json")
            similarity_by_depth(scores, folder / "similarity.png")
    return scores


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
    scores = get_scores(opened, request, progress, [f"{kind}:{count}" for count in counts if count])
    plans = [api.plan(scores, f"{kind}:{count}", request.target.keep) for count in counts if count]
    data = text_windows(Calibration(request.report.text, *shape, seed=HELD_OUT.seed), writer(opened, progress))
    models = [opened.model, *(api.drop(opened, plan) for plan in plans)]
    setting = SWEEP if speed else AT
    points = []
    with progress.stage(f"perplexity on {request.report.text}", len(models)) as tick:
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
