"""Validation before anything heavy is imported: options without effect, wrong names, files and output folders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from dropformer.eval.draft.options import check_options
from dropformer.eval.report.arguments import idle_options, leave_out
from dropformer.metrics.analysis.distributed import world
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.images import check_texts
from dropformer.metrics.calibration.text import check_name, writes_itself
from dropformer.metrics.repair.registry import REPAIRS
from dropformer.metrics.search.registry import SELECTIONS
from dropformer.prune.errors import CalibrationError, DropformerError, EvaluationError, OutputError, PlanError
from dropformer.prune.files.config_json import read_config
from dropformer.prune.files.output_paths import check_empty, check_out, check_place
from dropformer.prune.formats.registry import FORMATS, ExportFacts
from dropformer.prune.plan import Plan
from dropformer.prune.spec import check_keep, parse_spec
from dropformer.recipes.source import check_model, is_gguf
from dropformer.request import Request

PLACE = ("device", "dtype", "device_map")
STRATEGY = ("quality", "metric", "select", "refine", "repair", "epochs", "rank")
DRAFTING = ("batch", "max_drop", "temperature", "hardware", "write_anyway")
DRAWN = ("samples", "seed", "skip_first")  # options that select windows


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
        lambda r: r.target.spec and r.rung_kinds, STRATEGY, "beside windows or agents in --drop, which no search or "
        "repair knows", "repair the plan that --dry-run --json prints, by --plan",
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
    if not isfinite(request.report.seconds):
        raise EvaluationError(f"--seconds {request.report.seconds} never ends; expected a number, 0 for no measurement")
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
    check_texts(request.calibration.texts)
    texts = (*request.calibration.texts, request.selection.gate)
    if request.scoring.memory and (written := next(filter(writes_itself, texts), None)):
        raise CalibrationError(
            f"`{written}` is written by the whole model, which --memory does not load; name another text, or leave out "
            "--memory"
        )
    folder = check_model(request.model, spec, dense=request.drops)
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


def check_effects(request: Request) -> None:
    """Raises DropformerError for a given option that would be ignored."""
    for rule in RULES:
        idle = [option for option in rule.options if option in request.given]
        if idle and rule.where(request):
            why, advice = rule.why.format(format=request.export.format), rule.advice and f" or {rule.advice}"
            raise DropformerError(f"{idle_options(idle)} {why}; {leave_out(idle)}{advice}")


def check_subcommand(given: Collection[str], subcommand: str) -> None:
    """Raises DropformerError for options before a subcommand, which would be ignored."""
    if given:
        options = sorted(given)
        raise DropformerError(f"{idle_options(options)} before {subcommand}; put options behind {subcommand}")


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
    if request.maps and not form.maps:
        able = ", ".join(other for other, kind in FORMATS.items() if kind.maps)
        raise PlanError(f"--format {name} has no place for linear maps, which are asked for; give --format {able}")
    if (rungs := request.rung_kinds) and not form.rungs:
        raise form.without_rungs(name, "window" in rungs)
    if form.runs and request.on_files:
        raise OutputError(f"--format {name} runs the model, which a plan alone does not load; add --measure")
    mapping = [repair for repair in request.repairs if REPAIRS[repair].maps]
    if mapping and not form.maps and (kinds is None or "attn" in kinds):
        raise PlanError(
            f"--format {name} has no place for linear maps; repair another way than --repair {mapping[0]}, or leave "
            "out --format"
        )
