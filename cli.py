"""The `prune` command: parse, call the library, print.  Everything heavy is imported when it is needed."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropformer import __version__, clashes
from dropformer.commands import estimate, evaluate, sweep
from dropformer.compare_command import compare
from dropformer.prune.errors import DropformerError, PlanError
from dropformer.prune.files.output_paths import given_path

if TYPE_CHECKING:
    from dropformer.job import Overrides
    from dropformer.metrics.search.strategy import Strategy

app = typer.Typer(
    name="prune",
    help="Find the layers a Transformer can do without, take them out, and prove what that cost and saved.",
    epilog="Example: prune --model smollm2-135m --drop attn:4",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Text = str | None
# Headings of `prune --help`
CHOICE, TEXT, REPORT = "What goes, and what is repaired", "Calibration", "What is measured"
FILES, MACHINE = "What is written", "Where it computes"
MODEL = "A folder, a Hub id or id@revision, a .gguf file, or a recipe (see `prune recipes`)."
DROP = "What to drop: attn:8, mlp:25%, block:4, joint:12, attn=20,21, published:attn:8, or several by commas."
QUALITY = "A named way to choose and to repair: paper (the default), best, healed (all in the weights), linear."
METRIC = "What ranks: similarity, angular, relative-magnitude, loo-kl, loo-perplexity."
REPAIR = "By commas: refit, refit-all, distill, lora (all end in the weights), linear (a map for each attention)."
BUDGET = "In place of --drop: kv:-25%, params:-20%, decode:1.3x (by bytes) or measured:1.3x (by the clock)."
REFINE = "Rounds of swaps in what was chosen, or in a --plan, for as long as one lowers the KL."
MEASURE = (
    "Perplexity and speed, dense and pruned; by default unless a --plan is followed, which needs no model in memory."
)
FORMAT = "dropformer; dense (zeros, loads anywhere); deci (vLLM); gguf (llama.cpp, from a .gguf); onnx."
PACKABLE = "Drop pairs of neighbours (joint:N), so that a stock, shorter model is left; says what that costs."
Keep = Annotated[str, typer.Option(help="Blocks to leave whole, such as 0,1,-1.", rich_help_panel=CHOICE)]
Out = Annotated[
    Path | None,
    typer.Option(help="Where to write; must not exist or be empty.", parser=given_path, metavar="PATH"),
]
Revision = Annotated[Text, typer.Option(help="Branch, tag or commit of a Hub model.")]
TEXTS = "builtin, c4, wikitext, or a .txt, .jsonl (texts, prompts with completions, or messages) or .parquet file"
CalibrationText = Annotated[Text, typer.Option("--calibration", help=f"{TEXTS}.", rich_help_panel=TEXT)]
CalibrationTexts = Annotated[
    Text,
    typer.Option("--calibration", help=f"{TEXTS}; several by commas with --quality or --repair.", rich_help_panel=TEXT),
]
Samples = Annotated[int | None, typer.Option(min=1, help="Calibration windows.", rich_help_panel=TEXT)]
Length = Annotated[int | None, typer.Option(min=2, help="Tokens in a window.", rich_help_panel=TEXT)]
Seed = Annotated[int | None, typer.Option(help="Which windows are drawn.", rich_help_panel=TEXT)]
SkipFirst = Annotated[
    int | None,
    typer.Option(min=0, help="Leading tokens of a window that are run but not scored.", rich_help_panel=TEXT),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows run at once.", rich_help_panel=TEXT)]
UntilStable = Annotated[Text, typer.Option(help="A drop spec; stop once the layers that it drops are settled.")]
Memory = Annotated[Text, typer.Option(help="Read the weights block by block, in no more RAM than this: 2GiB.")]
Dtype = Annotated[
    Text,
    typer.Option(
        help="Computation: float32, bfloat16, float16, auto. The export never casts.", rich_help_panel=MACHINE
    ),
]
Device = Annotated[Text, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=MACHINE)]
DeviceMap = Annotated[
    Text, typer.Option(help="Passed to accelerate, for models larger than one GPU: auto.", rich_help_panel=MACHINE)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=MACHINE)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


# Of click, which typer carries under one name or another.
USAGE_ERRORS: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dropformer {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def prune(
    context: typer.Context,
    model: Annotated[Text, typer.Option("--model", "-m", help=MODEL)] = None,
    drop: Annotated[Text, typer.Option("--drop", "-d", help=DROP, rich_help_panel=CHOICE)] = None,
    out: Out = None,
    keep: Keep = "",
    plan: Annotated[
        Path | None, typer.Option(help="A plan.json to follow instead of --drop.", rich_help_panel=CHOICE)
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="A scores.json of this model to plan from.", rich_help_panel=CHOICE)
    ] = None,
    revision: Revision = None,
    calibration: CalibrationTexts = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    skip_first: SkipFirst = None,
    batch_size: BatchSize = 1,
    quality: Annotated[Text, typer.Option(help=QUALITY, rich_help_panel=CHOICE)] = None,
    metric: Annotated[Text, typer.Option(help=METRIC, rich_help_panel=CHOICE)] = None,
    select: Annotated[
        Text, typer.Option(help="one-shot, iterative, or greedy on the KL to the dense model.", rich_help_panel=CHOICE)
    ] = None,
    refine: Annotated[int | None, typer.Option(min=0, help=REFINE, rich_help_panel=CHOICE)] = None,
    budget: Annotated[Text, typer.Option(help=BUDGET, rich_help_panel=CHOICE)] = None,
    repair: Annotated[Text, typer.Option(help=REPAIR, rich_help_panel=CHOICE)] = None,
    gate: Annotated[
        str, typer.Option(help="Text that a repair must help on, or it is not kept.", rich_help_panel=CHOICE)
    ] = "docstrings",
    text: Annotated[
        str, typer.Option(help="Text for the report's perplexity, as for --calibration.", rich_help_panel=REPORT)
    ] = "heldout",
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for the speed measurement; 0 leaves it out.", rich_help_panel=REPORT)
    ] = 18.0,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    memory: Memory = None,
    trust_remote_code: TrustRemoteCode = False,
    measure: Annotated[
        bool | None, typer.Option("--measure/--no-measure", help=MEASURE, rich_help_panel=REPORT)
    ] = None,
    format: Annotated[str, typer.Option(help=FORMAT, rich_help_panel=FILES)] = "dropformer",
    link: Annotated[
        bool, typer.Option("--link", help="Hard-link the shards in which nothing changes.", rich_help_panel=FILES)
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every byte with the source, not a sample.", rich_help_panel=FILES)
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop at the plan and say what it would save.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The main job: score, plan, drop, export, reload, verify, report."""
    given = _given(context)
    if context.invoked_subcommand:
        clashes.check_subcommand(given, context.invoked_subcommand)
        return
    clashes.check_one_choice(given)
    if not model or [drop, plan, budget].count(None) == 3:
        raise DropformerError(
            "prune needs --model and one of --drop, --plan or --budget; "
            "for example: prune --model smollm2-135m --drop attn:4"
        )
    from dropformer import preflight
    from dropformer.metrics.analysis import distributed
    from dropformer.prune.formats.writing import ExportOptions
    from dropformer.prune.spec import parse_keep

    if distributed.world() > 1:
        raise DropformerError(
            "this job runs in one process; launch `analyze` on many, and give its scores with --scores"
        )
    better = _better(quality, metric, select, repair, refine, budget)
    on_files = bool(plan and not (better or measure or dry_run))
    texts = preflight.texts(calibration, several=better is not None)
    images = any(Path(text).is_dir() for text in texts)
    clashes.check(clashes.Command(given, better, format, on_files, measure is not False, images))
    target = out or preflight.default_out(model, drop or budget, plan)
    kept = parse_keep(keep)
    preflight.check_job(
        preflight.Job(
            model, drop, plan, scores, texts, (text, gate), kept,
            None if dry_run else target, format, better.repair if better else (), on_files,
        )
    )  # fmt: skip
    how = ExportOptions(format, link, verify, trust_remote_code=trust_remote_code)
    if plan and on_files:
        _by_plan(model, revision, plan, target, how, as_json, quiet)
        return
    from dropformer import console, job
    from dropformer.selection import Improvement

    request = job.Request(
        model, drop, out, kept, plan, scores, revision, batch_size,
        _overrides(",".join(texts) or None, samples, length, seed, skip_first),
        _placement(dtype, device, device_map, trust_remote_code), text, seconds,
        improvement=Improvement(better, budget, gate) if better else None, how=how, measure=measure is not False,
        memory=memory,
    )  # fmt: skip
    progress = console.Terminal(quiet)
    if memory is not None:
        _print_written(model, target, job.run_from_disk(request, progress), as_json)
        return
    if dry_run:
        made = job.plan_only(request, progress)
        _print(made.to_json() if as_json else None, console.plan_table(made), console.savings_line(made))
        return
    outcome = job.run(request, progress)
    exported = outcome.exported
    notes = [*console.report_notes(outcome.report), console.done(outcome.out, exported.record, exported.max_difference)]
    _print(outcome.report.to_json() if as_json else None, console.report_table(outcome.report), *notes)


def _given(context: typer.Context) -> set[str]:
    """The parameters that the user wrote, as against those left at their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _better(
    quality: Text, metric: Text, select: Text, repair: Text, refine: int | None, budget: Text
) -> Strategy | None:
    """What to do beyond one-shot similarity, or None; nothing heavy is imported for it."""
    if not refine and all(said is None for said in (quality, metric, select, repair, budget)):
        return None
    from dropformer.metrics.search import strategy as known

    if repair is not None and not repair.strip(" ,"):
        raise PlanError(f"--repair `{repair}` is unknown; expected one of {', '.join(known.REPAIRS)}")
    if budget is not None:
        from dropformer.metrics.search.budget import parse_budget

        parse_budget(budget)
    return known.quality(quality, metric, select, repair, refine).under(budget)


def _by_plan(
    model: str, revision: Text, plan: Path, out: Path, how: Any, as_json: bool, quiet: bool
) -> None:  # fmt: skip
    """Follow a plan on the files alone: no model in memory."""
    from dataclasses import replace

    from dropformer import console
    from dropformer.prune.formats.export_plan import write_by_plan
    from dropformer.prune.plan import Plan
    from dropformer.recipes import open_source

    made = Plan.read(plan)
    progress = console.Terminal(quiet)
    source = open_source(model, revision, progress.say)
    if made.repairs:
        progress.say(made.lost_repairs(plan))
    with progress.stage("copying", 100) as tick:
        how = replace(how, gguf=source.file, progress=lambda done, total: tick(100 * done // max(1, total), 0))
        written = write_by_plan(made, source.path, out, how)
    _print_written(model, out, written, as_json)


def _print_written(model: str, out: Path, written: Any, as_json: bool) -> None:
    """What was written on the files alone, and how it can be measured."""
    from dropformer import console
    from dropformer.prune.formats.registry import known_format

    record = json.dumps(written.record, indent=1)
    notes = [console.done(out, written.record)]
    if known_format(written.record["format"]).reloads:
        notes.insert(0, f"not measured: `prune evaluate {model} {out}` does it, and --measure here")
    _print(record if as_json else None, console.record_table(written.record), *notes)


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[
        Path | None, typer.Option(help="Folder for scores.json and similarity.png.", parser=given_path, metavar="PATH")
    ] = None,
    revision: Revision = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    skip_first: SkipFirst = None,
    batch_size: BatchSize = 1,
    until_stable: UntilStable = None,
    memory: Memory = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score every block, attention layer and MLP layer; write scores.json and a picture."""
    from dropformer import preflight

    texts = preflight.texts(calibration)
    preflight.check(model, until_stable, texts)
    from dropformer import console, job
    from dropformer.metrics.analysis import distributed

    request = job.Request(
        model, out=out, revision=revision, batch_size=batch_size,
        calibration=_overrides(next(iter(texts), None), samples, length, seed, skip_first),
        placement=_placement(dtype, device, device_map, trust_remote_code),
        until_stable=until_stable, memory=memory,
    )  # fmt: skip
    first = distributed.rank() == 0
    scores, folder = job.analyze(request, console.Terminal(quiet or not first))
    if not first:
        return
    _print(
        scores.to_json() if as_json else None,
        console.scores_table(scores),
        f"wrote {folder}/scores.json and {folder}/similarity.png",
    )


@app.command()
def plan(
    scores: Annotated[Path, typer.Argument(help="A scores.json that `prune analyze` wrote.")],
    drop: Annotated[str, typer.Option("--drop", "-d", help=DROP)],
    keep: Keep = "",
    packable: Annotated[bool, typer.Option("--packable", help=PACKABLE)] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the plan, for --plan.", parser=given_path, metavar="PATH")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make another plan from the same scores, without the model."""
    from dropformer import console
    from dropformer.metrics.analysis.planning import plan_from
    from dropformer.metrics.analysis.scores import Scores
    from dropformer.prune.spec import parse_keep
    from dropformer.recipes.recipe import recipe_of
    from dropformer.recipes.recipe import recipes as known

    read = Scores.read(scores)
    recipe = known().get(read.model.name) or recipe_of(read.model.hub or read.model.name)
    made = plan_from(read, drop, parse_keep(keep), recipe.published if recipe else None, packable)  # type: ignore[arg-type]
    if out:
        made.write(out)
    _print(made.to_json() if as_json else None, console.plan_table(made), console.savings_line(made))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that dropformer wrote.")],
    repo: Annotated[str, typer.Argument(help="The model repository on the Hub: user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    quiet: Quiet = False,
) -> None:
    """Publish a pruned checkpoint with its model card on the Hugging Face Hub."""
    from dropformer import console
    from dropformer.recipes.push import push as upload

    console.out.print(f"pushed to {upload(folder, repo, private, console.Terminal(quiet).say)}", markup=False)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the models that dropformer knows by name."""
    from dropformer import console
    from dropformer.recipes import recipes as known

    text = json.dumps({name: recipe.model_dump(mode="json") for name, recipe in known().items()}, indent=1)
    _print(text if as_json else None, console.recipes_table(known()))


app.command()(compare)
app.command()(evaluate)
app.command()(estimate)
app.command()(sweep)


def _overrides(calibration: Text, samples: Any, length: Any, seed: Any, skip_first: Any) -> Overrides:
    from dropformer.job import Overrides

    return Overrides(calibration, samples, length, seed, skip_first)


def _placement(dtype: Text, device: Text, device_map: Text, trust_remote_code: bool) -> Any:
    from dropformer.recipes.opening import Placement

    return Placement(dtype, device, device_map, trust_remote_code)


def _print(as_json: str | None, *parts: Any) -> None:
    from dropformer import console

    if as_json is not None:
        sys.stdout.write(as_json if as_json.endswith("\n") else as_json + "\n")
        return
    for part in parts:
        console.out.print(part, markup=not isinstance(part, str))


def main() -> None:
    """Run the command; what a user can cause ends in one line on stderr and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except USAGE_ERRORS as error:
        said = " ".join(error.format_message().split()).rstrip(".")
        if said:  # without a word it has just helped
            _fail(f"{said}; see `prune --help`")
        sys.exit(0)
    except DropformerError as error:
        _fail(" ".join(str(error).split()))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
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
