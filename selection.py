"""Selection and repair beyond one-shot similarity: --quality, --metric, --select, --budget and --repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dropformer import api
from dropformer.eval.cost.decoding import layer_latency
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.data import default_settings, text_windows
from dropformer.metrics.calibration.settings import Calibration, check_length
from dropformer.metrics.calibration.windows import Windows, named_texts
from dropformer.metrics.offload.process_memory import PeakMemory
from dropformer.metrics.repair.base import Repair, reasons
from dropformer.metrics.repair.registry import REPAIRS
from dropformer.metrics.search.budget import Latency
from dropformer.metrics.search.calibration import tokens_read
from dropformer.metrics.search.improve import Improver
from dropformer.metrics.search.improve import improve as improved_plan
from dropformer.metrics.search.strategy import Strategy, Target
from dropformer.metrics.search.strategy import quality as named
from dropformer.progress import Progress, Silent
from dropformer.prune.architecture import of_images
from dropformer.prune.block_map import attention_path
from dropformer.prune.errors import CalibrationError, ModelError, PlanError
from dropformer.prune.files.config_json import read_config
from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.window_attention import CONSTANTS
from dropformer.prune.plan import Plan, make_plan
from dropformer.prune.samples.inputs import writes_text
from dropformer.prune.spec import parse_spec
from dropformer.ranking import batches_beyond, losses_by_rung, plan_of_rungs
from dropformer.recipes.opening import LoadedModel, open_model
from dropformer.request import GATE, CalibrationOptions, Request, recipe_calibration
from dropformer.scoring import check_early, get_scores, writer

if TYPE_CHECKING:
    from dropformer.metrics.blockwise.from_disk import BlockSource

SAMPLES = 64  # default number of windows for repairs, which need more than rankings


def improve(
    model: str | Path | LoadedModel, spec: str, quality: str | Strategy = "best", texts: Sequence[Calibration] = ()
) -> tuple[Plan, Repair]:
    """Select layers by `spec` and repair the others, for `drop(model, plan, repair)`.

    `quality`: a named strategy (`paper`, `best`, `linear`) or a `Strategy`; `texts`: calibration texts, by default the
    recipe's, else builtin.  Repairs are validated on torch's docstrings.  Raises a DropformerError.
    """
    opened = model if isinstance(model, LoadedModel) else open_model(model)
    how = quality if isinstance(quality, Strategy) else named(quality)
    texts = texts or [default_settings(opened.model, _plenty(recipe_calibration(opened.recipe), how))]
    need_tokenizer(opened)
    data = [text_windows(text, writer(opened, Silent())) for text in texts]
    other = gate_windows(opened, Silent()) if how.repair else None
    plan, repair, _ = improved_plan(Improver(opened.model, data, how), opened.ref, Target(spec), other)
    return noted(plan, repair, opened.model), repair


def need_tokenizer(opened: LoadedModel) -> Any:
    """Raises ModelError for a model without a tokenizer, and for one that is not a causal language model."""
    if not writes_text(opened.model):
        raise ModelError(
            f"{opened.ref.name} is no causal language model, so only one-shot similarity serves: leave out --quality, "
            "--metric, --select, --refine, --budget and --repair"
        )
    if opened.tokenizer is None:
        raise ModelError(f"{opened.ref.name} has no tokenizer, so no text can choose or repair; leave out --quality")
    return opened.tokenizer


def improved(
    opened: LoadedModel,
    request: Request,
    progress: Progress,
    blocks: BlockSource | None = None,
    plan: Plan | None = None,
) -> tuple[Plan, Repair]:
    """The plan and the repair of a request's strategy; a given `plan` is only refined, mapped and repaired.

    `--calibration` may list several texts, which share the windows equally.  `blocks` reads the weights of a model
    that is not in memory.  Raises PlanError, CalibrationError, ArchitectureError or ModelError.
    """
    chosen, target = request.selection, request.target
    strategy = chosen.strategy or Strategy()
    need_tokenizer(opened)
    if not (plan or chosen.plan or blocks):
        check_early(opened, request)
    calibration = calibrated_on(opened, request, progress)
    progress.say("calibration: " + "; ".join(f"{w.ref.name}, {len(w)} windows of {w.ref.length}" for w in calibration))
    other = gate_windows(opened, progress, chosen.gate) if strategy.repair else None
    memory = PeakMemory(input_device(opened.model))
    known = blocks.given() if blocks else {"known": opened.architecture}
    improver = Improver(opened.model, calibration, strategy, progress.say, **known)
    if read := tokens_read(improver.parts):
        progress.say(read)
    given = plan or (given_plan(opened, chosen.plan) if chosen.plan else None)
    given = given or plan_of_rungs(opened, request, progress, improver)
    total = improver.steps(chooses=given is None, budget=target.budget is not None)
    fitting = "linear maps" if given and given.mapped else "preparing"
    stage = f"choosing and repairing by {wording(strategy)}" if chosen.strategy else fitting
    with progress.stage(stage, total) as tick:
        improver.work.progress = lambda done, tokens: tick(min(done, total), tokens)
        if given:
            if given.repairs and not strategy.repair:
                progress.say(given.lost_repairs(chosen.plan))
            plan = refined(given.unrepaired(), improver)
            repair, _ = improver.repair(plan.layers, other, plan.mapped)
            if strategy.repair or plan.fitted:  # record the data of the fit, not of the plan's scores
                plan = plan.model_copy(update={"calibration": named_texts(improver.data)})
        else:
            timed = (target.budget or "").startswith("measured")
            latency = measured(opened.model, improver, progress) if timed else None
            published = opened.recipe.published if opened.recipe else None
            target = replace(target, latency=latency, published=published)
            plan, repair, _ = improved_plan(improver, opened.ref, target, other)
    repair = replace(with_folds(opened, request.calibration, plan, repair, progress), extra_bytes=memory.extra)
    if repair.passes:
        progress.say(repair.cost)
    return noted(plan, repair, opened.model), repair


def with_folds(opened: LoadedModel, said: CalibrationOptions, plan: Plan, repair: Repair, progress: Progress) -> Repair:
    """The repair with the constants of the plan's folded windows, fitted on text several windows long.

    Raises PlanError, CalibrationError.
    """
    if not plan.folded:
        return repair
    from dropformer.metrics.search.fold import fit_folds, named_constants

    batches = batches_beyond(max(plan.folded.values()), opened, said, progress)
    with progress.stage(f"constants in place of sinks in {len(plan.folded)} layers"):
        found = fit_folds(opened.model, plan.outline, plan.folded.items(), batches)
    return replace(repair, tensors={**repair.tensors, **named_constants(plan.outline, found)})


def measured(model: nn.Module, improver: Improver, progress: Progress) -> Latency:
    """Measured latency per layer of a decode step, with a line that says so."""
    found = layer_latency(model, improver.architecture)
    shares = {
        kind: sum(seconds for layer, seconds in found.seconds.items() if layer.kind == kind) / found.total
        for kind in ("attn", "mlp")
    }
    progress.say(
        f"measured: a decoded token takes {1000 * found.total:.3g} ms, "
        f"{shares['attn']:.0%} of it in attention layers and {shares['mlp']:.0%} in MLP layers"
    )
    return found


def refined(plan: Plan, improver: Improver) -> Plan:
    """The plan after the improver's rounds of swaps."""
    layers = improver.refined(plan.layers, plan.keep, plan.mapped, plan.rungs)
    if set(layers) == set(plan.layers):
        return plan
    fields: dict[str, Any] = {
        "keep": plan.keep,
        "metric": f"{plan.metric or 'given'}, refined",
        "calibration": plan.calibration,
    }
    return make_plan(plan.outline, plan.model, plan.spec, layers, rungs=plan.rungs, **fields)


def wording(quality: Strategy) -> str:
    """The settings in a few words, such as `greedy, refit`."""
    chosen = quality.metric if quality.select == "one-shot" else quality.select
    return ", ".join([chosen, *(["refined"] if quality.refine else []), *quality.repair])


def calibrated_on(opened: LoadedModel, request: Request, progress: Progress) -> list[Windows]:
    """The calibration windows, one entry per text."""
    settings = request.calibration.of(opened.recipe)
    if request.calibration.length is None:
        settings = default_settings(opened.model, settings)
    check_length(read_config(opened.path), settings.length, opened.ref.name)
    if request.calibration.samples is None and request.selection.strategy:
        settings = _plenty(settings, request.selection.strategy)
    names = settings.name.split(",")
    if settings.samples < len(names):
        raise PlanError(f"{settings.samples} calibration windows are too few for {len(names)} texts; raise --samples")
    each, more = divmod(settings.samples, len(names))
    parts = [replace(settings, name=name, samples=each + (n < more)) for n, name in enumerate(names)]
    pen = writer(opened, progress)
    return [text_windows(part, pen) for part in parts]


def gate_windows(opened: LoadedModel, progress: Progress, name: str = GATE.name) -> Windows:
    """Windows of the validation text of repairs, at most the context length.  Raises CalibrationError."""
    try:
        return text_windows(default_settings(opened.model, replace(GATE, name=name)), writer(opened, progress))
    except CalibrationError as error:
        raise CalibrationError(f"--gate: {error}") from None


def _plenty(text: Calibration, quality: Strategy) -> Calibration:
    """The settings with enough windows for a repair, if the strategy has one."""
    return replace(text, samples=max(text.samples, SAMPLES)) if quality.repair else text


def given_plan(opened: LoadedModel, path: Path) -> Plan:
    """The plan in a file.  Raises PlanError if it was made for other weights."""
    plan = Plan.read(path)
    if plan.model.fingerprint != opened.ref.fingerprint:
        raise PlanError(f"{path} was made for other weights than {opened.ref.name}; plan this model")
    return plan


def noted(plan: Plan, repair: Repair, model: nn.Module) -> Plan:
    """The plan with its repairs recorded, and parameters of linear maps, the norms they keep and constants counted."""
    folds = {attention_path(plan.outline, layer) for layer in plan.folded}
    stay = sum(
        t.numel() for name, t in repair.tensors.items() if name.endswith(CONSTANTS) and name.rpartition(".")[0] in folds
    )
    for layer, forms in repair.mapped.items():
        path = f"{plan.outline.stack(layer.stack).path}.{layer.index}."
        maps = {f"{path}{name}" for name in forms}
        stay += sum(t.numel() for name, t in repair.tensors.items() if name.rpartition(".")[0] in maps)
        branch = plan.outline.stack(layer.stack).branch("attn", layer.index)
        norms = [path + name for name in (branch.modules if branch else ()) if name not in forms]
        stay += sum(p.numel() for name in norms for p in model.get_submodule(name).parameters())
    savings = plan.savings.model_copy(update={"parameters_after": plan.savings.parameters_after + stay})
    kept = [str(gate) for gate in repair.gates if gate.passed]
    fields = {"repairs": kept, "not_repaired": reasons(repair.unrepaired), "savings": savings}
    return plan.model_copy(update=fields)


def fit(
    model: str | Path | LoadedModel, plan: Plan, texts: Sequence[Calibration] = (), repair: Sequence[str] = ()
) -> tuple[Plan, Repair]:
    """Fit a plan's linear maps and folded sinks, and repair by these methods, for `drop(model, plan, repair)`.

    `texts`: as for `improve`; methods apply in their own order, as on the command line.  Raises a DropformerError.
    """
    opened = model if isinstance(model, LoadedModel) else open_model(model)
    how = Strategy(repair=REPAIRS.in_order([repair] if isinstance(repair, str) else repair))
    texts = texts or [default_settings(opened.model, replace(recipe_calibration(opened.recipe), samples=SAMPLES))]
    need_tokenizer(opened)
    improver = Improver(opened.model, [text_windows(text, writer(opened, Silent())) for text in texts], how)
    plan = plan.unrepaired()
    found, _ = improver.repair(plan.layers, gate_windows(opened, Silent()) if repair else None, plan.mapped)
    found = with_folds(opened, CalibrationOptions(), plan, found, Silent())
    return noted(plan.model_copy(update={"calibration": named_texts(improver.data)}), found, opened.model), found


def one_shot_plan(opened: LoadedModel, request: Request, progress: Progress) -> tuple[Plan, Scores | None]:
    """The plan from a file, from lists (without calibration), or from scores."""
    if path := request.selection.plan:
        plan = given_plan(opened, path)
        if plan.repairs:
            progress.say(plan.lost_repairs(path))
        return plan.unrepaired(), None
    if made := plan_of_rungs(opened, request, progress):
        return made, None
    spec, keep = request.target.spec, request.target.keep
    published = opened.recipe.published if opened.recipe else None
    if all(s.published or s.rung or s.indices is not None for s in parse_spec(spec)):
        outline = api.outline(opened.model, spec)
        losses = losses_by_rung(opened, request, outline, progress)
        return api.plan_unscored(opened.ref, outline, spec, keep, published, losses), None
    if seen := next((s for s in parse_spec(spec) if of_images(s.stack)), None):
        raise PlanError(
            f"`{seen}` needs scores on images with their texts; name the layers, as in {seen.stack}.{seen.kind}=1,2, "
            "or use dropformer.analyze(model, batches) in Python"
        )
    scores = get_scores(opened, request, progress)
    losses = losses_by_rung(opened, request, scores.outline, progress)
    return api.plan(scores, spec, keep, published, losses=losses), scores
