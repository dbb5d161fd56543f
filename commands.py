"""The subcommands of `prune` that open models: each parses, validates, calls and prints.  Heavy imports come late."""

from __future__ import annotations

import os

import typer

from dropformer import cli_options as options

BATCH, CONTEXT = "1", "512"


def given(context: typer.Context) -> frozenset[str]:
    """Names of the parameters that the user gave, without those left at their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")


def analyze(
    context: typer.Context,
    model: options.ModelArgument,
    out: options.ScoresOut = None,
    revision: options.Revision = None,
    calibration: options.CalibrationText = None,
    samples: options.Samples = None,
    length: options.Length = None,
    seed: options.Seed = None,
    skip_first: options.SkipFirst = None,
    batch_size: options.BatchSize = None,
    until_stable: options.UntilStable = None,
    memory: options.Memory = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Score every block, attention layer and MLP layer; write scores.json and a picture."""
    from dropformer import request as asked
    from dropformer.validate import validate

    request = asked.Request(
        model,
        calibration=asked.CalibrationOptions(asked.calibration_texts(calibration), samples, length, seed, skip_first),
        scoring=asked.ScoringOptions(batch_size, until_stable, memory),
        placement=asked.Placement(dtype, device, device_map, trust_remote_code),
        out=out, revision=revision, given=given(context),
    )  # fmt: skip
    validate(request)
    from dropformer import console, job
    from dropformer.metrics.analysis import distributed

    first = distributed.rank() == 0
    scores = job.analyze(request, console.Terminal(quiet or not first))
    if first:
        wrote = f"wrote {request.folder}/scores.json and {request.folder}/similarity.png"
        console.show(scores.to_json() if as_json else None, console.scores_table(scores), wrote)


def plan(
    scores: options.ScoresArgument,
    drop: options.NeededDrop,
    keep: options.Keep = "",
    packable: options.Packable = False,
    out: options.PlanOut = None,
    as_json: options.Json = False,
) -> None:
    """Make another plan from the same scores, without the model."""
    from dropformer import console
    from dropformer.metrics.analysis.planning import plan_from
    from dropformer.metrics.analysis.scores import Scores
    from dropformer.prune.spec import parse_keep
    from dropformer.recipes.recipe import recipe_for

    read = Scores.read(scores)
    recipe = recipe_for(read.model.name, read.model.hub or read.model.name)
    made = plan_from(read, drop, parse_keep(keep), recipe.published if recipe else None, packable)
    if out:
        made.write(out)
    console.show_plan(made, as_json)


def sweep(
    context: typer.Context,
    model: options.ModelArgument,
    drop: options.DropRange,
    keep: options.Keep = "",
    calibration: options.CalibrationText = None,
    text: options.ReportText = "heldout",
    samples: options.TextSamples = 8,
    length: options.TextLength = 256,
    speed: options.Speed = False,
    out: options.SweepOut = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Quality for every number of drops, the speed-up, and where the cliff is."""
    from dropformer import request as asked
    from dropformer.eval.quality.drop_range import parse_range
    from dropformer.prune.files.output_paths import check_out
    from dropformer.prune.spec import parse_keep
    from dropformer.validate import validate

    spec, counts = parse_range(drop)
    request = asked.Request(
        model, asked.Target(spec.format(counts[-1]), parse_keep(keep)), report=asked.ReportOptions(text=text),
        calibration=asked.CalibrationOptions(asked.calibration_texts(calibration)), dry_run=True,
        placement=asked.Placement(dtype, device, device_map, trust_remote_code),
    )  # fmt: skip
    validate(request)
    folder = out or request.named("sweep")
    check_out(folder, "sweep.json")
    from dropformer import console, job
    from dropformer.eval.quality.sweep import draw
    from dropformer.prune.files.folder import new_files

    found = job.sweep(request, spec, counts, (samples, length), console.Terminal(quiet), speed)
    with new_files(folder) as made:
        found.write(made / "sweep.json")
        draw(found, made / "sweep.png")
    console.show_sweep(found, folder, as_json)


def evaluate(
    context: typer.Context,
    models: options.Models,
    tasks: options.Tasks = "",
    shots: options.Shots = None,
    mmlu_data: options.MmluData = None,
    include: options.IncludePath = None,
    limit: options.Limit = None,
    seed: options.QuestionSeed = 0,
    backend: options.Backend = "fast",
    text: options.ReportText = "heldout",
    samples: options.TextSamples = 8,
    length: options.TextLength = 512,
    probes: options.Probes = True,
    speed: options.Speed = False,
    batch: options.Batches = BATCH,
    prompt: options.Contexts = CONTEXT,
    new_tokens: options.NewTokens = 32,
    repeats: options.Repeats = 5,
    compile: options.Compile = None,
    stream: options.Stream = 0,
    window: options.Window = None,
    long: options.Long = 0,
    cache: options.AnswerCache = None,
    sweep: options.SweepFile = None,
    draft: options.DraftPlan = None,
    out: options.ReportOut = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What a drop cost and what it saved: tasks, perplexity, probes, speed, memory, side by side."""
    os.environ["TQDM_DISABLE"] = "1"  # before tqdm is there: lm-eval shows a bar for each of MMLU's 57 subjects
    from dropformer.eval.report.arguments import EvaluationFacts, validate_evaluation
    from dropformer.request import parse_numbers

    names = tuple(name for name in tasks.replace(" ", "").split(",") if name)
    facts = EvaluationFacts(models, names, text, backend, mmlu_data, cache, sweep, out, given(context))
    validate_evaluation(facts)
    batches = None if batch == "paper" else parse_numbers("--batch", batch)
    prompts = parse_numbers("--context", prompt)
    from dropformer import console
    from dropformer.eval.cost.speed import PAPER, grid
    from dropformer.eval.quality.perplexity import HELD_OUT
    from dropformer.eval.report.evaluation import EvaluationOptions
    from dropformer.eval.report.run import evaluate_models
    from dropformer.eval.tasks.results import TaskOptions
    from dropformer.metrics.analysis import distributed
    from dropformer.metrics.calibration.settings import Calibration
    from dropformer.recipes.placement import Placement

    placement = Placement(dtype, device, device_map, trust_remote_code)
    if draft:
        from dropformer.eval.draft.run import evaluate_pair

        words = Calibration(text, samples, length, HELD_OUT.seed + seed)
        pair = evaluate_pair(models[0], draft, words, new_tokens, placement)
        if out:
            pair.write(out)
        console.show(pair.to_json() if as_json else None, *pair.lines())
        return
    if names:
        from dropformer.eval.tasks.registry import find_tasks  # imports lm-eval, which takes seconds

        find_tasks(names, mmlu_data, include)  # a missing task or data is reported before a model is loaded
    settings = [] if not speed else [PAPER] if batches is None else grid(batches, prompts, new_tokens)
    wanted = EvaluationOptions(
        names, TaskOptions(shots, limit, seed, mmlu_data, include, backend, cache=cache),
        Calibration(text, samples, length, HELD_OUT.seed + seed) if text else None,
        probes, tuple(settings), repeats=repeats, compile=compile, stream=stream, window=window, long=long,
    )  # fmt: skip
    first = distributed.rank() == 0
    run = evaluate_models(models, wanted, placement, console.Terminal(quiet or not first))
    if first and out:
        run.write(out, sweep)
    if first:
        console.show_evaluation(run.found, out, as_json)


def compare(
    checkpoints: options.Checkpoints,
    drop: options.Drop = None,
    out: options.CompareOut = None,
    revisions: options.Revisions = None,
    tokenizer: options.Tokenizer = None,
    keep: options.Keep = "",
    keep_downloads: options.KeepDownloads = False,
    calibration: options.CalibrationText = None,
    samples: options.Samples = None,
    length: options.Length = None,
    seed: options.Seed = None,
    batch_size: options.BatchSize = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """How redundancy and the layers to drop change over training, or between pruned variants."""
    from dropformer import request as asked
    from dropformer.prune.spec import parse_keep
    from dropformer.validate import validate_comparison

    texts = asked.calibration_texts(calibration)
    folder = out or asked.Request(checkpoints[0]).named("compare")
    validate_comparison(drop, texts, folder)
    from dropformer import console
    from dropformer.eval.compare import compare as comparing
    from dropformer.eval.compare import output
    from dropformer.recipes.recipe import recipe_for

    recipe = recipe_for(checkpoints[0], checkpoints[0].partition("@")[0])
    request = comparing.CompareRequest(
        checkpoints, drop, parse_keep(keep), [r for r in (revisions or "").replace(" ", "").split(",") if r], tokenizer,
        asked.CalibrationOptions(texts, samples, length, seed).of(recipe), batch_size,
        asked.Placement(dtype, device, device_map, trust_remote_code), keep_downloads,
    )  # fmt: skip
    found = comparing.compare(request, console.Terminal(quiet))
    console.show_comparison(found, output.write(found, folder), as_json)
