"""The description of one run, before any model is opened.  Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from dropformer.eval.draft.options import DraftOptions
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.repair.registry import REPAIRS, Training
from dropformer.metrics.search.budget import parse_budget
from dropformer.metrics.search.ladder import check_rungs
from dropformer.metrics.search.strategy import Strategy, Target
from dropformer.metrics.search.strategy import quality as named_strategy
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import CalibrationError, EvaluationError, OutputError, PlanError
from dropformer.prune.formats.writing import ExportOptions
from dropformer.prune.plan import Plan
from dropformer.prune.rungs.linear import LinearMap
from dropformer.prune.rungs.registry import parse_rungs
from dropformer.prune.spec import folds, parse_keep, parse_spec
from dropformer.prune.window import CONTEXT
from dropformer.recipes import Recipe
from dropformer.recipes.placement import Placement
from dropformer.recipes.source import short_name

GATE = Calibration("docstrings", samples=4, length=512, seed=1)
"""Default validation text of repairs."""


def recipe_calibration(recipe: Recipe | None) -> Calibration:
    """The recipe's calibration, else the builtin text."""
    if recipe is None:
        return Calibration()
    return Calibration(recipe.calibration.name, recipe.calibration.windows, recipe.calibration.length)


def calibration_texts(names: str | None, several: bool = False) -> tuple[str, ...]:
    """The calibration texts of a comma-separated list, () for None.  Raises CalibrationError.

    `several`: several texts are allowed, as in a search or a repair.
    """
    if names is None:
        return ()
    whole = not several and Path(names).exists()  # a file name may contain a comma
    found = tuple(name.strip() for name in ([names] if whole else names.split(",")) if name.strip())
    if not found:
        raise CalibrationError("--calibration names no text; expected builtin, c4, wikitext or a file, or leave it out")
    if len(found) > 1 and not several:
        raise CalibrationError(
            f"--calibration `{names}` names several texts, which need `prune` with --quality or --repair; name one"
        )
    return found


def parse_numbers(option: str, text: str) -> list[int]:
    """The positive numbers of a comma-separated list.  Raises EvaluationError."""
    parts = text.replace(" ", "").split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise EvaluationError(f"{option} {text} cannot be read; expected numbers by commas")
    return [int(part) for part in parts]


def chosen_target(drop: str | None, keep: str, budget: str | None, rungs: str | None, context: int | None) -> Target:
    """The target that the options describe.  Raises PlanError."""
    target = Target(drop or "", parse_keep(keep), budget, context or Target.context)
    if rungs is None:
        return target
    target = replace(target, rungs=parse_rungs(rungs), context=context or CONTEXT)
    if budget is not None and parse_budget(budget).what == "measured":
        raise PlanError(f"budget `{budget}` times layers, and rungs are told by bytes: use decode, kv or params")
    check_rungs(target.rungs, target.context)
    return target


def chosen_strategy(
    quality: str | None, metric: str | None, select: str | None, repair: str | None, refine: int | None,
    budget: str | None, training: Training | None = None,
) -> Strategy | None:  # fmt: skip
    """The strategy that the options describe, None for one-shot similarity.  Raises PlanError."""
    trains = training is not None and training.given
    if not refine and not trains and all(said is None for said in (quality, metric, select, repair, budget)):
        return None
    if repair is not None and not repair.strip(" ,"):
        REPAIRS[repair]  # raises
    if budget is not None:
        parse_budget(budget)
    return named_strategy(quality, metric, select, repair, refine, training).under(budget)


def chosen_format(name: str, dense: bool) -> str:
    """The export format of --format and --dense.  Raises OutputError for one that --dense is no part of."""
    if dense and not name.startswith("gguf"):
        raise OutputError(
            f"--dense belongs to --format gguf, and this is --format {name}; give --format dense for zeros"
        )
    return "gguf-dense" if dense else name


@dataclass(frozen=True)
class CalibrationOptions:
    """Calibration options; empty or None means the recipe's settings, else the defaults."""

    texts: Sequence[str] = ()
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    skip_first: int | None = None

    def of(self, recipe: Recipe | None) -> Calibration:
        """The settings for a model; several texts are joined in one name."""
        numbers = {key: value for key, value in vars(self).items() if key != "texts" and value is not None}
        base = recipe_calibration(recipe)
        name = ",".join(self.texts) or base.name
        if name != base.name:
            base = Calibration(name)  # the recipe's sizes are for the recipe's text
        return replace(base, **numbers)


@dataclass(frozen=True)
class ScoringOptions:
    """How scores are measured: batch size (None: automatic), a drop spec to stop at once stable, a memory limit."""

    batch_size: int | None = None
    until_stable: str | None = None
    memory: str | None = None


@dataclass(frozen=True)
class SelectionOptions:
    """How layers are selected and the others repaired, beyond one-shot similarity.

    `plan`: a file to follow instead of the target; `scores`: a file to plan from; `gate`: the text on which a
    repair is validated.
    """

    strategy: Strategy | None = None
    plan: Path | None = None
    scores: Path | None = None
    gate: str = GATE.name


@dataclass(frozen=True)
class ReportOptions:
    """What is measured on the result: text for perplexity, seconds for speed (0: none)."""

    measure: bool | None = None
    text: str = "heldout"
    seconds: float = 18.0


@dataclass(frozen=True)
class Request:
    """One run: score, plan, drop, export, report.  `draft`: search for the model's own draft.

    `given`: names of the parameters that the user gave, of which one without effect is an error.
    """

    model: str
    target: Target = field(default_factory=Target)
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    placement: Placement = field(default_factory=Placement)
    report: ReportOptions = field(default_factory=ReportOptions)
    export: ExportOptions = field(default_factory=ExportOptions)
    out: Path | None = None
    revision: str | None = None
    dry_run: bool = False
    given: frozenset[str] = frozenset()
    draft: DraftOptions | None = None

    @property
    def on_files(self) -> bool:
        """Whether a plan is applied by copying byte ranges, without a model in memory."""
        chosen = self.selection
        return bool(chosen.plan and not (chosen.strategy or self.report.measure or self.dry_run or self.fits))

    @cached_property
    def fits(self) -> bool:
        """Whether the spec or the plan has linear maps or folded sinks, which are fitted on text."""
        if self.selection.plan:
            return self.selection.plan.is_file() and Plan.read(self.selection.plan).fitted
        selectors = parse_spec(self.target.spec) if self.target.spec else ()
        return self.maps or any(map(folds, selectors))

    @cached_property
    def maps(self) -> bool:
        """Whether the spec, the plan or the rungs have linear maps."""
        if self.selection.plan:
            return self.selection.plan.is_file() and bool(Plan.read(self.selection.plan).maps)
        selectors = parse_spec(self.target.spec) if self.target.spec else ()
        rungs = any(isinstance(rung, LinearMap) for rung in self.target.rungs)
        return rungs or any(selector.kind == "linear" for selector in selectors)

    @cached_property
    def rung_kinds(self) -> set[str]:
        """What attention layers that stay become by the spec or the plan: "window", "agent"."""
        if self.selection.plan:
            plan = Plan.read(self.selection.plan)
            return {kind for kind, layers in (("window", plan.windows), ("agent", plan.agents)) if layers}
        return {item.kind for item in parse_spec(self.target.spec) if item.rung} if self.target.spec else set()

    @cached_property
    def named_layers(self) -> list[Layer] | None:
        """The layers to drop, where the spec or the plan names them all; numbers from the end stay negative."""
        if self.selection.plan:
            return Plan.read(self.selection.plan).layers
        items = parse_spec(self.target.spec) if self.target.spec else ()
        if not items or any(item.indices is None or item.stack or item.rung for item in items):
            return None
        pairs = [(item.indices or (), ("attn", "mlp") if item.kind == "block" else item.kinds) for item in items]
        return [Layer(kind, i) for indices, kinds in pairs for i in indices for kind in kinds]

    @property
    def drops(self) -> bool:
        """Whether the run drops layers, rather than only scoring them."""
        return bool(self.target.spec or self.target.budget or self.selection.plan or self.draft)

    @property
    def measures(self) -> bool:
        return self.report.measure is not False

    @property
    def repairs(self) -> tuple[str, ...]:
        return self.selection.strategy.repair if self.selection.strategy else ()

    @cached_property
    def folder(self) -> Path:
        """The folder of the result; by default ./MODEL-SPEC, as in llama-2-13b-attn16."""
        plan = self.selection.plan
        spec = self.target.spec or self.target.budget or (plan.stem if plan else "draft" if self.draft else "scores")
        short = "".join(c if c.isalnum() or c in ".=-" else "-" if c == "," else "" for c in spec.replace("%", "pct"))
        return self.out or self.named(short)

    def named(self, what: str) -> Path:
        """./MODEL-WHAT."""
        return Path(f"{short_name(self.model)}-{what}")
