"""The main job end to end: fetch, calibrate, score, plan, drop, measure, export, reload, verify, report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from dropformer import api, scoring
from dropformer.eval.cost.timing import Setting
from dropformer.eval.draft.choose import DraftFound, choose_draft
from dropformer.eval.draft.verdict import add_to_card
from dropformer.eval.quality.output_similarity import OutputSimilarity, output_similarity
from dropformer.eval.quality.perplexity import HELD_OUT, tokens_read
from dropformer.eval.quality.sweep import AT, Sweep, find_cliff, point, with_speed
from dropformer.eval.report import report as reports
from dropformer.metrics.analysis.distributed import rank
from dropformer.metrics.analysis.plots import similarity_by_depth
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.data import calibration_data, default_settings, text_windows
from dropformer.metrics.calibration.images import PIXELS
from dropformer.metrics.calibration.settings import Calibration, check_length
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.repair.base import Repair
from dropformer.progress import Progress, Silent
from dropformer.prune.errors import ModelError
from dropformer.prune.files import CopyReport
from dropformer.prune.files.folder import new_files
from dropformer.prune.files.output_paths import check_empty, check_place
from dropformer.prune.formats.export import export
from dropformer.prune.formats.export_plan import plan_kept, write_by_plan
from dropformer.prune.formats.registry import FORMATS
from dropformer.prune.formats.writing import Exported
from dropformer.prune.loading.load import usable_device
from dropformer.prune.plan import Plan
from dropformer.prune.samples.inputs import takes_pictures, writes_text
from dropformer.prune.window import CONTEXT
from dropformer.ranking import swept_plans
from dropformer.recipes.follow import in_percent
from dropformer.recipes.opening import LoadedModel, open_model, torch_dtype
from dropformer.request import Request
from dropformer.selection import improved, one_shot_plan

SWEEP = Setting(prompt=256, new=16)
"""Setting at which a sweep measures speed."""


@dataclass(frozen=True)
class Outcome:
    """Results of the main job."""

    out: Path
    plan: Plan
    report: reports.Report
    exported: Exported


def plan_only(request: Request, progress: Progress | None = None) -> Plan:
    """The plan that `run` would apply."""
    progress = progress or Silent()
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, request.placement, progress.say)
    if request.selection.strategy or (request.target.rungs and request.maps):
        return improved(opened, request, progress)[0]
    plan = one_shot_plan(opened, request, progress)[0]
    return improved(opened, request, progress, plan=plan)[0] if plan.fitted else plan


def draft(request: Request, progress: Progress | None = None) -> tuple[DraftFound, Outcome | None]:
    """Find the model's own draft, and write it if it pays or `anyway` is set.  Raises a DropformerError."""
    progress, options = progress or Silent(), request.draft
    assert options is not None
    if not request.dry_run:
        check_empty(request.folder)
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, request.placement, progress.say)
    data = scoring.draft_windows(opened, request.calibration, options, progress)
    repaired = partial(_repaired, opened, request, progress) if request.repairs else None
    found = choose_draft(opened, options, data, request.target.keep, progress, repaired)
    if request.dry_run or not (found.pays or options.anyway):
        return found, None
    with plan_kept(found.plan, request.folder, always=True):
        held_out = scoring.held_out_windows(opened, request, progress)
        chosen = _Chosen(found.plan, None, found.repair, partial(add_to_card, found))
        report, exported = _carried_out(opened, chosen, request.folder, held_out, request, progress)
    return found, Outcome(request.folder, found.plan, report, exported)


def _repaired(opened: LoadedModel, request: Request, progress: Progress, plan: Plan) -> tuple[Plan, Repair]:
    """A draft's plan repaired on as many tokens as drafts are measured on, if that number was asked for."""
    said, options = request.calibration, request.draft
    assert options is not None
    samples = said.samples and max(2, said.samples * options.context // Calibration.length)
    return improved(opened, replace(request, calibration=replace(said, samples=samples)), progress, plan=plan)


def run(request: Request, progress: Progress | None = None) -> Outcome:
    """Run the whole job.  Raises a DropformerError and then leaves no output.

    After a failed check, an out-of-memory error or a long search, the plan is kept beside the output.
    """
    progress = progress or Silent()
    out = request.folder
    check_empty(out)
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, request.placement, progress.say)
    held_out = scoring.held_out_windows(opened, request, progress)  # raises before anything is measured
    scores, repair = None, None
    if request.selection.strategy or (request.target.rungs and request.maps):
        plan, repair = improved(opened, request, progress)
    else:
        plan, scores = one_shot_plan(opened, request, progress)
        if plan.fitted:
            plan, repair = improved(opened, request, progress, plan=plan)
    _say(plan, progress)
    with plan_kept(plan, out, always=request.selection.strategy is not None):
        chosen = _Chosen(plan, scores, repair)
        report, exported = _carried_out(opened, chosen, out, held_out, request, progress)
    return Outcome(out, plan, report, exported)


def _say(plan: Plan, progress: Progress) -> None:
    """What is done to which layers."""
    if dropped := [str(layer) for layer in plan.layers if layer not in plan.mapped]:
        progress.say(f"dropping {', '.join(dropped)}")
    if plan.maps:
        progress.say(f"linear maps in place of {', '.join(plan.maps)}")
    if plan.windows:
        progress.say("windows: " + ", ".join(f"{layer}@{window}" for layer, window in plan.windows.items()))
        progress.say(f"KV cache at {CONTEXT:,} tokens: {plan.kv_share(CONTEXT):.0%} of the dense model's")
    if plan.agents:
        progress.say("agents: " + ", ".join(f"{layer}@{count}" for layer, count in plan.agents.items()))
    if any(layer.kind == "attn" and layer.index == 0 for layer in plan.layers):
        progress.say("warning: the attention of block 0 is dropped; vLLM and llama.cpp cannot load a model without it")


@dataclass(frozen=True)
class _Chosen:
    """What to do to the model, and the scores behind it where there are any.

    add: writes more files into the folder, and returns lines for the model card.
    """

    plan: Plan
    scores: Scores | None
    repair: Repair | None
    add: Callable[[Path], list[str]] = lambda folder: []


def _carried_out(
    opened: LoadedModel, chosen: _Chosen, out: Path, held_out: Windows | None, request: Request, progress: Progress
) -> tuple[reports.Report, Exported]:
    """Drop, measure on the held-out windows, export and verify."""
    plan = chosen.plan
    pruned = api.drop(opened, plan, chosen.repair)
    surgery = api.drop_record(pruned).surgery
    if surgery.note:
        progress.say(f"dropped blocks stay as identity blocks: {surgery.note}")
    quality, speed = _measure(opened, pruned, plan, request, held_out, progress)
    made: list[reports.Report] = []

    def finish(folder: Path, copied: CopyReport) -> list[str]:
        kept = pruned if FORMATS[request.export.format].saves else opened.model
        made.append(reports.report_of((opened.model, kept), plan, copied, quality, speed, chosen.repair))
        reports.write_artifacts(folder, made[0], plan, chosen.scores)
        return [*reports.card_lines(made[0]), *chosen.add(folder)]

    with progress.stage("exporting, reloading and verifying") as tick:
        how = replace(request.export, gguf=opened.file, progress=tick)
        exported = export(pruned, surgery, plan, opened.path, out, how, finish)
    return made[0], exported


def run_from_disk(request: Request, progress: Progress | None = None) -> Exported:
    """Select, repair and export with weights read from the files block by block, for a model that exceeds memory.

    The result is neither measured nor reloaded.  Raises a DropformerError.
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
    _say(plan, progress)
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


def _calibrated_on(opened: LoadedModel, plan: Plan, request: Request) -> list[str]:
    """Names of the texts that layers were selected or repaired on; none if a list names the layers."""
    chosen = str(plan.calibration["name"]).split(",") if plan.calibration else []
    repaired = (
        request.calibration.of(opened.recipe).name.split(",") if request.selection.strategy or plan.fitted else []
    )
    return chosen + repaired


def _likeness(opened: LoadedModel, pruned: Any, request: Request, progress: Progress) -> OutputSimilarity | None:
    """Output similarity on held-out text, or on images of the calibration set; None without either."""
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

    Of several processes launched together, only the first writes.
    """
    progress = progress or Silent()
    check_place(request.folder)
    opened = scoring.open_to_score(request, progress)
    scores = scoring.get_scores(opened, request, progress)
    if rank() == 0:
        with new_files(request.folder) as folder:
            scores.write(folder / "scores.json")
            similarity_by_depth(scores, folder / "similarity.png")
    return scores


def sweep(
    request: Request, spec: str, counts: list[int], shape: tuple[int, int], progress: Progress, speed: bool = False
) -> Sweep:
    """Measure perplexity for every number of drops, most redundant first, on windows of text of shape (N, T).

    spec: such as "attn:{}" or "window:{}@256+4".  With `speed`, all models are timed too, interleaved.
    """
    with progress.stage("opening the model"):
        opened = open_model(request.model, request.revision, request.placement, progress.say)
    if not writes_text(opened.model):
        raise ModelError(
            f"a sweep measures perplexity, but {request.model} is not a causal language model; prune it with --drop"
        )
    check_length(opened.model.config, max(shape[1], SWEEP.prompt + SWEEP.new if speed else 0), opened.ref.name)
    plans = swept_plans(opened, request, [spec.format(count) for count in counts if count], shape[1], progress)
    data = text_windows(Calibration(request.report.text, *shape, seed=HELD_OUT.seed), scoring.writer(opened, progress))
    models = [opened.model, *(api.drop(opened, plan) for plan in plans)]
    setting = SWEEP if speed else AT
    points = []
    with progress.stage(f"perplexity on {request.report.text}", len(models)) as tick:
        for model, layers in zip(models, [[], *([*plan.layers, *plan.windowed] for plan in plans)], strict=True):
            points.append(point(opened.model, model, layers, data.ids, setting, data.partly_scored))
            tick(len(points), len(points) * data.ids.numel())
    if speed:
        with progress.stage(f"speed, {len(models)} models interleaved"):
            points = with_speed(points, models, setting)
    return Sweep(
        model=opened.ref, of=spec.replace(":{}", ""), text=data.ref.model_dump(), setting=str(setting), points=points,
        cliff=find_cliff(points),
    )  # fmt: skip
