"""The `prune` command and its subcommands that load no weights.  Heavy modules are imported when a command runs."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Any

import typer

from dropformer import cli_options as options
from dropformer import commands
from dropformer.eval.draft.options import RUNGS, DraftOptions
from dropformer.prune.errors import DropformerError, EvaluationError
from dropformer.prune.files.folder import FULL

if TYPE_CHECKING:
    from dropformer.request import Request

app = typer.Typer(
    name="prune",
    help="Find the layers a Transformer can do without, drop them, and measure what that costs and saves.",
    epilog="Example: prune --model smollm2-135m --drop attn:4",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def engines(folder: options.Loadable, full: options.Full = False, as_json: options.Json = False) -> None:
    """Which engines load a checkpoint, by which command, and what to do for the others."""
    from dropformer import console
    from dropformer.prune.engines.registry import engines as answers

    console.show_engines(answers(folder), as_json, full)


def estimate(
    model: options.ConfigOf,
    drop: options.NeededDrop,
    hardware: options.Hardware = "a6000",
    context: options.TotalTokens = None,
    new_tokens: options.AnswerTokens = None,
    batch: options.Batch = 1,
    draft: options.DraftEstimate = False,
    as_json: options.Json = False,
) -> None:
    """Predict from the config alone what a drop saves: bytes, FLOPs, roofline times, speed-up."""
    from dropformer.prune.spec import parse_spec

    parse_spec(drop)
    if draft and new_tokens:
        raise EvaluationError("--new-tokens has no effect beside --draft, which counts single steps; leave it out")
    from dropformer import console
    from dropformer.eval.cost import estimate as costs
    from dropformer.eval.cost.encoder import check_encoder
    from dropformer.eval.cost.hardware import hardware as named_hardware
    from dropformer.eval.cost.roofline import Workload
    from dropformer.recipes.recipe import recipe_for

    device, recipe, cost = named_hardware(hardware), recipe_for(model), costs.cost_of_name(model)
    lists = recipe.published if recipe else None
    if cost.tokens:
        check_encoder(model, draft, new_tokens)
        encoder = costs.forward_estimate(cost, drop, device, context, batch)
        console.show(encoder.to_json() if as_json else None, *encoder.lines())
        return
    workload = Workload(context or 4096, batch, new_tokens)
    if draft:
        from dropformer.eval.draft.estimate import draft_estimate

        pays = draft_estimate(cost, drop, workload, device, lists)
        console.show(pays.to_json() if as_json else None, *pays.lines())
        return
    found = costs.estimate(cost, drop, device, workload, lists)
    console.show_estimate(found, costs.published_speedup(recipe, drop), as_json)


def push(
    folder: options.Pushed, repo: options.Repository, private: options.Private = False, quiet: options.Quiet = False
) -> None:
    """Publish a pruned checkpoint with its model card on the Hugging Face Hub."""
    from dropformer import console
    from dropformer.recipes.push import push as upload

    console.show(None, f"pushed to {upload(folder, repo, private, console.Terminal(quiet).say)}")


def recipes(as_json: options.Json = False) -> None:
    """List the models that dropformer knows by name."""
    from dropformer import console
    from dropformer.recipes import recipes as known

    console.show_recipes(known(), as_json)


for command in (
    commands.analyze,
    commands.plan,
    engines,
    push,
    recipes,
    commands.compare,
    commands.evaluate,
    estimate,
    commands.sweep,
):
    app.command()(command)

# click's UsageError, which typer exposes under different names.
USAGE_ERRORS: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")


@app.callback(invoke_without_command=True)
def prune(
    context: typer.Context,
    model: options.Model = None,
    drop: options.Drop = None,
    out: options.Out = None,
    keep: options.Keep = "",
    plan: options.PlanFile = None,
    scores: options.ScoresFile = None,
    revision: options.Revision = None,
    calibration: options.CalibrationText = None,
    samples: options.Samples = None,
    length: options.Length = None,
    seed: options.Seed = None,
    skip_first: options.SkipFirst = None,
    batch_size: options.BatchSize = None,
    quality: options.Quality = None,
    metric: options.Metric = None,
    select: options.Select = None,
    refine: options.Refine = None,
    budget: options.Budget = None,
    draft: options.Draft = False,
    context_tokens: options.BudgetContext = None,
    batch: options.DraftBatch = 1,
    max_drop: options.MaxDrop = None,
    rungs: options.Rungs = None,
    temperature: options.Temperature = 1.0,
    hardware: options.DraftHardware = "cpu",
    write_anyway: options.Anyway = False,
    repair: options.RepairMethods = None,
    epochs: options.Epochs = None,
    rank: options.Rank = None,
    gate: options.Gate = "docstrings",
    text: options.ReportText = "heldout",
    seconds: options.Seconds = 18.0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    memory: options.Memory = None,
    trust_remote_code: options.TrustRemoteCode = False,
    measure: options.Measure = None,
    format: options.Format = "dropformer",
    dense: options.Zeros = False,
    link: options.Link = False,
    verify: options.Verify = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    version: options.Version = False,
) -> None:
    """The main job: score, plan, drop, export, reload, verify, report."""
    from dropformer import request as asked
    from dropformer import validate

    given = commands.given(context)
    if context.invoked_subcommand:
        validate.check_subcommand(given, context.invoked_subcommand)
        return
    validate.check_target(given)
    training = asked.Training(epochs, rank)
    strategy = asked.chosen_strategy(quality, metric, select, repair, refine, None if rungs else budget, training)
    texts = asked.calibration_texts(calibration, several=strategy is not None)
    request = asked.Request(
        model or "",
        asked.chosen_target(drop, keep, budget, *((None, None) if draft else (rungs, context_tokens))),
        asked.SelectionOptions(strategy, plan, scores, gate),
        asked.CalibrationOptions(texts, samples, length, seed, skip_first),
        asked.ScoringOptions(batch_size, memory=memory),
        asked.Placement(dtype, device, device_map, trust_remote_code),
        asked.ReportOptions(measure, text, seconds),
        asked.ExportOptions(asked.chosen_format(format, dense), link, verify, trust_remote_code=trust_remote_code),
        out, revision, dry_run, given,
        DraftOptions(
            context_tokens or DraftOptions.context, batch, max_drop, RUNGS if rungs is None else rungs, temperature,
            hardware, write_anyway,
        ) if draft else None,
    )  # fmt: skip
    validate.validate(request)
    _carry_out(request, quiet, as_json)


def _carry_out(request: Request, quiet: bool, as_json: bool) -> None:
    """Run a validated request and print its result: on files only, as a draft, from disk, or the whole job."""
    from dropformer import console

    progress = console.Terminal(quiet)
    if request.on_files and request.selection.plan:
        from dropformer.recipes.follow import follow_plan

        plan, model = request.selection.plan, request.model
        written = follow_plan(plan, model, request.folder, request.export, request.revision, progress)
        console.show_export(written, model, as_json)
        return
    from dropformer import job

    if request.draft:
        from dropformer.eval.draft import verdict as drafts

        found, outcome = job.draft(request, progress)
        folder = outcome.out if outcome else None
        lines = drafts.lines_of(found, request.draft, request.model, folder)
        console.show(drafts.to_json(found, folder) if as_json else None, *lines)
    elif request.scoring.memory is not None:
        console.show_export(job.run_from_disk(request, progress), request.model, as_json)
    elif request.dry_run:
        console.show_plan(job.plan_only(request, progress), as_json)
    else:
        console.show_outcome(job.run(request, progress), as_json)


def main() -> None:
    """Run the command; user errors end in one line on stderr and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for word in sys.argv[1:]:
        if any("\ud800" <= letter <= "\udfff" for letter in word):  # no JSON, card or page could name it
            _fail(f"`{ascii(word)[1:-1]}` is not UTF-8; rename the file, or give a link to it")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except USAGE_ERRORS as error:
        said = " ".join(error.format_message().split()).rstrip(".")
        if said:  # empty after --help
            _fail(f"{said}; see `prune --help`")
        sys.exit(0)
    except DropformerError as error:
        _fail(" ".join(str(error).split()))
    except OSError as error:
        if error.errno not in (*FULL, errno.EACCES):
            raise
        _fail(f"cannot write: {error.strerror} ({error.filename or 'output'})")
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted; nothing was left half-written", err=True)
        sys.exit(130)


def _fail(line: str) -> None:
    typer.echo(f"prune: {line}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
