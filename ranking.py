"""What windows and agents take from each attention layer, and the plans that sweeps and budgets make of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, cast

from torch import Tensor

from dropformer import api
from dropformer.metrics.analysis.agent_loss import agent_losses
from dropformer.metrics.analysis.window_loss import TIMES, window_losses
from dropformer.metrics.calibration.batching import samples_at_once, windows_at_once
from dropformer.metrics.calibration.data import text_windows
from dropformer.metrics.calibration.far_recall import far_recall
from dropformer.metrics.calibration.settings import check_length, context_of
from dropformer.metrics.calibration.windows import named_texts
from dropformer.metrics.search.far_text import Fitted, tail_of
from dropformer.metrics.search.fold import Constants, fit_folds
from dropformer.metrics.search.improve import Improver
from dropformer.metrics.search.ladder import check_rungs
from dropformer.metrics.search.rungs import PASSES, mapped_modules, read_texts, rung_plan
from dropformer.progress import Progress
from dropformer.prune.architecture import Layer, of_images
from dropformer.prune.block_map import attention_path
from dropformer.prune.choosing import unprotected
from dropformer.prune.discovery.proof import outline as proven_outline
from dropformer.prune.errors import CalibrationError, ModelError, PlanError
from dropformer.prune.files.config_json import read_config
from dropformer.prune.loading.window_attention import unfit
from dropformer.prune.outline import Outline
from dropformer.prune.plan import Plan
from dropformer.prune.rungs.agent import Agents
from dropformer.prune.rungs.linear import LinearMap
from dropformer.prune.samples.inputs import takes_pictures, writes_text
from dropformer.prune.spec import Selector, folds, parse_spec
from dropformer.prune.window import Window
from dropformer.recipes.opening import LoadedModel
from dropformer.request import CalibrationOptions, Request
from dropformer.scoring import get_scores, material, writer

WINDOW_TOKENS = 8192  # read to rank windows by: about two texts several windows long
SINKS = 4  # real ones, by which folded windows are ranked
RECALL = "recall"  # beside any calibration text where rungs are chosen
TEXTS = 2  # of the context, by whose ends rungs are chosen
RANKED = 16  # texts or images to rank agents by


def losses_by_rung(
    opened: LoadedModel, request: Request, outline: Outline, progress: Progress
) -> dict[Layer, float] | None:
    """Loss of each layer under the first window or agents that a spec gives to a count of layers; None if it names all.

    A folded window is ranked with real sinks, whose place its constants take.  Raises PlanError for a vision tower,
    whose images come with texts.
    """
    counted = next((s for s in parse_spec(request.target.spec) if s.rung and s.indices is None), None)
    if counted is None:
        return None
    if of_images(counted.stack):
        raise PlanError(
            f"`{counted}` is ranked on images with their texts; name the layers, as in "
            f"{counted.stack}.{counted.kind}=1,2@{counted.rung}"
        )
    if isinstance(counted.rung, Agents):
        if writes_text(opened.model):
            raise PlanError(
                f"`{counted}`: agents are averages of all tokens, later ones too, and {opened.ref.name} is causal; "
                "give window:N@256+4"
            )
        return _agent_losses(opened, request, outline, counted, progress)
    assert counted.rung is not None
    if opened.tokenizer is None or takes_pictures(opened.model):
        raise PlanError(f"`{counted}` fits causal attention to text, and {opened.ref.name} reads none; give agent:4@49")
    window = replace(counted.rung, sinks=SINKS, fold=False) if counted.rung.fold else counted.rung
    batches = batches_beyond(window, opened, request.calibration, progress)
    with progress.stage(f"what a window of {window} takes"):
        losses = window_losses(opened.model, outline, batches, window, counted.stack)
    if not losses:
        raise PlanError(f"`{counted}`: no attention layer of {opened.ref.name} takes a window; drop layers instead")
    return losses


def _agent_losses(
    opened: LoadedModel, request: Request, outline: Outline, counted: Selector, progress: Progress
) -> dict[Layer, float]:
    said = request.calibration
    few = replace(request, calibration=replace(said, samples=said.samples or RANKED))
    data = material(opened, few, progress)
    with progress.stage(f"what {counted.rung} agents take, {len(data)} samples of {data.ref.name}"):
        batches = (inputs for inputs, _ in data.batches(samples_at_once(opened.model, data)))
        return agent_losses(opened.model, outline, batches, cast(Agents, counted.rung), counted.stack)


def swept_plans(opened: LoadedModel, request: Request, specs: list[str], length: int, progress: Progress) -> list[Plan]:
    """A plan for each spec.  Raises PlanError for windows as long as a text of this length, and for what is fitted."""
    (most,) = parse_spec(specs[-1])
    if most.kind == "linear" or folds(most):
        raise PlanError(
            f"a sweep fits nothing, and `{most}` is fitted on text; sweep attn:N or window:N@256+4, or prune"
        )
    if not isinstance(most.rung, Window):
        scores = get_scores(opened, request, progress, specs)
        return [api.plan(scores, spec, request.target.keep) for spec in specs]
    if most.rung.width + most.rung.sinks >= length:
        raise PlanError(f"a window of {most.rung} holds all of a text of {length} tokens; give a larger --length")
    outline = api.outline(opened.model, specs[-1])
    losses = losses_by_rung(opened, request, outline, progress)
    return [api.plan_unscored(opened.ref, outline, spec, request.target.keep, None, losses) for spec in specs]


def batches_beyond(
    window: Window, opened: LoadedModel, said: CalibrationOptions, progress: Progress
) -> list[dict[str, Tensor]]:
    """The calibration text in batches of windows several attention windows long."""
    settings = said.of(opened.recipe)
    length, samples = _read_for(window, opened, said)
    data = text_windows(replace(settings, length=length, samples=samples), writer(opened, progress))
    progress.say(f"beyond a window of {window}: {samples} x {length} tokens of {settings.name}")
    return [inputs for inputs, _ in data.batches(windows_at_once(opened.model, length))]


def _read_for(window: Window, opened: LoadedModel, said: CalibrationOptions) -> tuple[int, int]:
    """Length and number of the texts that attention windows are ranked on: several windows long."""
    several = TIMES * window.width
    limit = context_of(opened.model.config) or several
    length = said.length or min(limit, max(said.of(opened.recipe).length, several))
    return length, said.samples or max(2, WINDOW_TOKENS // length)


def plan_of_rungs(
    opened: LoadedModel, request: Request, progress: Progress, improver: Improver | None = None
) -> Plan | None:
    """The plan that a budget makes of `--rungs`, None where no rungs are asked for.

    `improver`: fits linear maps, where they are among the rungs.  Raises PlanError, CalibrationError,
    ArchitectureError or ModelError.
    """
    target = request.target
    if not target.rungs:
        return None
    if opened.tokenizer is None or not writes_text(opened.model):
        raise ModelError(f"{opened.ref.name} reads no text token by token, so no rung can be told from another")
    texts, named = _long_texts(opened, request, progress)
    outline, maps = proven_outline(opened.model), None
    free = unprotected(outline, ("attn",), "", target.keep)
    if improver and any(isinstance(rung, LinearMap) for rung in target.rungs):
        with progress.stage("fitting linear maps"):
            maps = mapped_modules(improver, free)
    constants = _constants(opened, request, outline, free, progress)
    blocks = outline.stacks[0].blocks
    with progress.stage(f"KL of {', '.join(map(str, target.rungs))}", round(PASSES * blocks)) as tick:
        search = read_texts(opened.model, outline, target.rungs, texts, target.keep, Fitted(maps, constants))
        search.tick = lambda passes: tick(min(round(passes * blocks), round(PASSES * blocks)), 0)
        plan = rung_plan(search, opened.ref, target, calibration=named)
    tried = ", ".join(f"{kl:.4f}" for kl in search.history)
    progress.say(f"KL of the plans at the end of the texts: {tried}; {search.passes:.1f} forward passes")
    return plan


def _constants(
    opened: LoadedModel, request: Request, outline: Outline, free: Sequence[Layer], progress: Progress
) -> Constants:
    """The constants of each folded window among the rungs in each layer that takes one."""
    folded = [w for w in check_rungs(request.target.rungs, request.target.context) if w.fold]
    if not folded:
        return {}
    batches = batches_beyond(max(folded), opened, request.calibration, progress)
    taking = [layer for layer in free if not unfit(opened.model.get_submodule(attention_path(outline, layer)))]
    with progress.stage(f"constants in place of sinks in {len(taking)} layers"):
        return fit_folds(opened.model, outline, product(taking, folded), batches)


def _long_texts(opened: LoadedModel, request: Request, progress: Progress) -> tuple[list[Tensor], dict[str, Any]]:
    """Texts of the context that ask at their end for what was said long before, and their record."""
    said, target = request.calibration, request.target
    settings = said.of(opened.recipe)
    limit = context_of(opened.model.config) or target.context
    length = said.length or min(limit, target.context)
    check_length(read_config(opened.path), length, opened.ref.name)
    widest = max(check_rungs(target.rungs, target.context))
    if widest.width + widest.sinks + tail_of(length) > length:
        raise CalibrationError(
            f"what a window of {widest} costs does not show in texts of {length:,} tokens; leave out --length, or "
            "give narrower windows"
        )
    names, write = settings.name.split(","), writer(opened, progress)
    each = max(1, (said.samples or TEXTS) // len(names))
    data = [text_windows(replace(settings, name=name, length=length, samples=each), write) for name in names]
    rows = [row for part in data for row in part.ids]
    texts = [far_recall(row, opened.tokenizer, tail_of(length), settings.seed + i) for i, row in enumerate(rows)]
    progress.say(f"calibration: {settings.name} with recall, {len(texts)} texts of {length:,} tokens")
    named = named_texts(data)
    return texts, named | {"name": f"{named['name']},{RECALL}"}
