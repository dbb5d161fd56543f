"""Validation before anything heavy is imported: options without effect, wrong names, files and output folders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropformer.eval.draft.options import check_options
from dropformer.eval.tasks.backends import BACKENDS
from dropformer.metrics.analysis.distributed import world
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.images import PIXELS, image_files
from dropformer.metrics.calibration.text import check_name
from dropformer.metrics.repair.registry import REPAIRS
from dropformer.metrics.search.registry import SELECTIONS
from dropformer.prune.errors import DropformerError, EvaluationError, OutputError, PlanError
from dropformer.prune.files import open_checkpoint
from dropformer.prune.files.config_json import read_config
from dropformer.prune.files.output_paths import check_empty, check_out, check_place
from dropformer.prune.formats.record import need_dense
from dropformer.prune.formats.registry import FORMATS, ExportFacts
from dropformer.prune.plan import Plan
from dropformer.prune.spec import check_drop, check_keep, check_stacks, parse_spec
from dropformer.recipes.source import is_gguf, locate
from dropformer.request import Request

PLACE = ("device", "dtype", "device_map")
STRATEGY = ("quality", "metric", "select", "refine", "repair", "epochs", "rank")
DRAFTING = ("batch", "max_drop", "temperature", "hardware", "write_anyway")
DRAWN = ("samples", "seed", "skip_first")  # options that select windows
# parameters whose option has another name
SPOKEN = {"as_json": "json", "include": "include_path", "prompt": "context", "context_tokens": "context"}


@dataclass(frozen=True)
class Rule:
    """`options` have no effect if `where` holds: the reason, and the alternative to leaving them out."""

    where: Callable[[Request], Any]
    options: tuple[str, ...]
    why: str
    advice: str = ""


RULES = (
    Rule(
        lambda r: not (r.target.budget or r.draft), ("rungs", "context_tokens"),
        "without a budget or --draft, which choose among rungs", "add one, as in --budget kv:-50%",
    ),
    Rule(
        lambda r: r.target.rungs, ("metric", "select", "refine", "memory"),
        "with --rungs, which are chosen by the damage of each in one pass of the whole model",
    ),
    Rule(
        lambda r: r.scoring.memory, ("text", "seconds", "measure", "dry_run"),
        "with --memory, which writes a checkpoint and measures nothing",
    ),
    Rule(
        lambda r: r.drops and not r.selection.strategy, ("memory",), "where one-shot similarity chooses",
        "add --quality, or give the scores of `prune analyze --memory` with --scores",
    ),
    Rule(
        lambda r: r.selection.plan, ("keep", "scores", "metric", "select"), "with --plan, which names the layers"
    ),
    Rule(
        lambda r: r.on_files, (*PLACE, "calibration", "length", "text", "seconds"),
        "with --plan, which is followed without a model in memory", "add --measure",
    ),
    Rule(
        lambda r: r.selection.plan and not (r.selection.strategy or r.fits), (*DRAWN, "batch_size"),
        "with --plan, for which nothing is scored", "add --repair",
    ),
    Rule(lambda r: r.selection.strategy, ("scores",), "beside --quality and its like, which measure anew"),
    Rule(
        lambda r: r.selection.scores, (*DRAWN, "length", "batch_size"),
        "with --scores, which were measured before", "leave out --scores",
    ),
    # a folder of images is also used to compare the outputs of a vision model
    Rule(
        lambda r: r.selection.scores and not any(Path(text).is_dir() for text in r.calibration.texts),
        ("calibration",), "with --scores, which were measured before", "leave out --scores",
    ),
    Rule(
        lambda r: r.selection.strategy, ("batch_size",),
        "with --quality, --metric, --select, --refine, --budget or --repair, whose windows run one at a time",
    ),
    Rule(lambda r: not r.repairs, ("gate",), "where nothing is repaired", "add --repair"),
    Rule(lambda r: r.target.budget, ("metric", "select"), "with --budget, which searches by the KL it costs"),
    Rule(
        lambda r: r.selection.strategy and SELECTIONS[r.selection.strategy.select].measures, ("metric",),
        "where a greedy search chooses, by the KL that it costs", "add --select one-shot or iterative",
    ),
    Rule(lambda r: not FORMATS[r.export.format].links, ("link",), "with --format {format}, which writes anew"),
    Rule(
        lambda r: not FORMATS[r.export.format].copies, ("verify",), "with --format {format}, which copies no bytes"
    ),
    Rule(lambda r: not r.measures, ("text", "seconds"), "with --no-measure"),
    Rule(lambda r: not r.draft, DRAFTING, "without --draft", "add --draft"),
    Rule(
        lambda r: r.draft, ("metric", "select", "refine", "scores", "memory", "length"), "with --draft, which searches "
        "by acceptance at --context",
    ),
    Rule(lambda r: r.draft and not r.repairs, ("quality",), "with --draft, for which it repairs nothing"),
)  # fmt: skip


def validate(request: Request) -> None:
    """Raise the errors of the run that options and files alone can show."""
    if request.drops and world() > 1:
        raise DropformerError(
            "this job runs in one process; launch `analyze` on many, and give its scores with --scores"
        )
    check_effects(request)
    if request.draft:
        check_options(request.draft)
        if maps := [name for name in request.repairs if REPAIRS[name].maps]:
            raise PlanError(f"--repair {maps[0]}: a draft drops layers or windows them; repair it by refit or distill")
    kinds = _kinds(request)
    _check_format(request, kinds)
    for text in (request.report.text, request.selection.gate):
        check_name(text)
    if request.selection.scores:
        Scores.read(request.selection.scores)
    if not request.drops:
        check_place(request.folder)
    elif not request.dry_run:
        check_empty(request.folder)
    spec = request.target.spec or request.scoring.until_stable
    folder = check_model(request.model, spec, request.calibration.texts, dense=request.drops)
    config = read_config(folder) if folder else None
    if config:
        check_keep(request.target.keep, request.target.spec, config)
    drops = (_may_pack(kinds), request.named_layers, bool(request.repairs))
    facts = ExportFacts(request.model, is_gguf(request.model), config, *drops)
    FORMATS[request.export.format].checker()(facts)


def validate_comparison(drop: str | None, texts: Sequence[str], out: Path) -> None:
    """Raise the errors of `prune compare` that its arguments alone can show."""
    if drop is not None:
        parse_spec(drop)
    for name in texts:
        check_name(name)
    check_out(out, "compare.json")


@dataclass(frozen=True)
class EvaluationFacts:
    """The arguments of `prune evaluate` that can be checked early; `given` as in a Request."""

    models: Sequence[str]
    tasks: Sequence[str]
    text: str
    backend: str
    mmlu_data: Path | None
    cache: Path | None
    sweep: Path | None
    out: Path | None
    given: frozenset[str] = frozenset()


NEEDED = (  # options of `prune evaluate` that need another one: (needed, dependent options, advice)
    ("tasks", ("shots", "limit", "mmlu_data", "include", "cache"), "name some, as in --tasks mmlu"),
    ("speed", ("batch", "prompt", "repeats", "compile"), "add it"),
    ("stream", ("window",), "give the number of tokens to stream, as in --stream 65536"),
    ("out", ("sweep",), "name a folder for the page"),
)
WITH_DRAFT = (  # all that `prune evaluate --draft` heeds
    *("models", "draft", "text", "samples", "length", "seed", "new_tokens", "dtype", "device", "device_map"),
    *("trust_remote_code", "out", "as_json", "quiet"),
)


def check_draft(facts: EvaluationFacts) -> None:
    """Raises EvaluationError for options that --draft would ignore, and for those that need it."""
    if "draft" not in facts.given:
        if "new_tokens" in facts.given and "speed" not in facts.given:
            raise EvaluationError("--new-tokens has no effect without --speed or --draft; leave it out, or add one")
        return
    if idle := [option for option in sorted(facts.given) if option not in WITH_DRAFT]:
        raise EvaluationError(f"{_idle(idle)} beside --draft, which measures a draft alone; {_leave(idle)}")
    if len(facts.models) != 1:
        raise EvaluationError("--draft measures a model with its own draft; name one model")


def validate_evaluation(facts: EvaluationFacts) -> None:
    """Raise the errors of an evaluation that its arguments and files alone can show."""
    check_draft(facts)
    for model in facts.models:
        check_model(model)
    if facts.text:
        check_name(facts.text)
    if facts.out:
        check_out(facts.out, "report.html")
    BACKENDS.in_order([facts.backend])
    for option, others, advice in NEEDED:
        idle = [other for other in others if other in facts.given]
        if idle and option not in facts.given:
            raise EvaluationError(f"{_idle(idle)} without --{option}; {_leave(idle)}, or {advice}")
    if facts.mmlu_data and not any(name.startswith("mmlu") for name in facts.tasks):
        raise EvaluationError("--mmlu-data serves the tasks mmlu and mmlu_SUBJECT; name one in --tasks")
    if facts.cache and facts.cache.exists() and not facts.cache.is_dir():
        raise EvaluationError(f"--cache {facts.cache} is a file; give a folder for the answers")
    if facts.sweep and not facts.sweep.is_file():
        raise EvaluationError(f"{facts.sweep} does not exist; expected a sweep.json that `prune sweep` wrote")


def check_effects(request: Request) -> None:
    """Raises DropformerError for a given option that would be ignored."""
    for rule in RULES:
        idle = [option for option in rule.options if option in request.given]
        if idle and rule.where(request):
            why = rule.why.format(format=request.export.format)
            raise DropformerError(f"{_idle(idle)} {why}; {_leave(idle)}{f' or {rule.advice}' * bool(rule.advice)}")


def check_subcommand(given: Collection[str], subcommand: str) -> None:
    """Raises DropformerError for options before a subcommand, which would be ignored."""
    if options := sorted(given):
        raise DropformerError(f"{_idle(options)} before {subcommand}; put options behind {subcommand}")


def check_target(given: Collection[str]) -> None:
    """Raises DropformerError unless a model and exactly one of --drop, --plan, --budget, --draft are given."""
    chosen = {"drop", "plan", "budget", "draft"}.intersection(given)
    if len(chosen) > 1:
        raise DropformerError("give only one of --drop, --plan, --budget and --draft")
    if not chosen or "model" not in given:
        raise DropformerError(
            "prune needs --model and one of --drop, --plan, --budget or --draft; "
            "for example: prune --model smollm2-135m --drop attn:4"
        )


def check_model(model: str, drop: str | None = None, texts: Sequence[str] = (), dense: bool = False) -> Path | None:
    """Raise the errors that arguments and files alone can show; returns the model's folder.

    `dense`: a pruned checkpoint is an error.  The folder is None for a model to be downloaded or converted first.
    """
    if drop is not None:
        parse_spec(drop)
    for name in texts:
        if Path(name).is_dir():
            image_files(name)
        elif name != PIXELS:
            check_name(name)
    folder = locate(model)
    if folder:
        tensors = open_checkpoint(folder).tensors
        config = read_config(folder)
        if dense:
            need_dense(config, model)
        check_stacks(drop, tensors, model)
        check_drop(drop, config, model)
    return folder


def _kinds(request: Request) -> set[str] | None:
    """The kinds of layers to drop; None if a budget or draft chooses.  Raises PlanError, or as reading a plan."""
    if request.selection.plan:
        return {layer.kind for layer in Plan.read(request.selection.plan).layers}
    if request.draft or (not request.target.spec and "drop" not in request.given):
        return None
    return {kind for selector in parse_spec(request.target.spec) for kind in selector.kinds}


def _may_pack(kinds: set[str] | None) -> bool:
    """Whether the remaining branches may form a shorter stock model, which dropping only one kind rules out."""
    return kinds is None or "block" in kinds or {"attn", "mlp"} <= kinds


def _check_format(request: Request, kinds: set[str] | None) -> None:
    """Raises OutputError or PlanError for an unknown format, or one that does not fit the run."""
    name = request.export.format
    form = FORMATS[name]
    if form.runs and request.on_files:
        raise OutputError(f"--format {name} runs the model, which a plan alone does not load; add --measure")
    if request.maps and not form.maps:
        able = ", ".join(other for other, kind in FORMATS.items() if kind.maps)
        raise PlanError(f"--format {name} has no place for linear maps, which are asked for; give --format {able}")
    if (rungs := request.rung_kinds) and not form.rungs:
        raise form.without_rungs(name, "window" in rungs)
    mapping = [repair for repair in request.repairs if REPAIRS[repair].maps]
    if mapping and not form.maps and (kinds is None or "attn" in kinds):
        raise PlanError(
            f"--format {name} has no place for linear maps; repair another way than --repair {mapping[0]}, or leave "
            "out --format"
        )


def _idle(options: list[str]) -> str:
    flags = ["--" + SPOKEN.get(option, option).replace("_", "-") for option in options]
    listed = " and ".join(filter(None, [", ".join(flags[:-1]), flags[-1]]))
    return f"{listed} {'has' if len(flags) == 1 else 'have'} no effect"


def _leave(options: list[str]) -> str:
    return "leave it out" if len(options) == 1 else "leave them out"
