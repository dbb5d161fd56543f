"""The best draft of a model: rankings by one forward pass each, then a search by measured acceptance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dropformer.eval.cost.counting import cost_of
from dropformer.eval.cost.hardware import hardware
from dropformer.eval.cost.roofline import Workload
from dropformer.eval.draft.cost import MeasuredSteps, Steps, measured_steps
from dropformer.eval.draft.options import DraftOptions, parse_rungs
from dropformer.metrics.analysis.analyze import analyze_model
from dropformer.metrics.analysis.window_loss import TIMES, window_losses
from dropformer.metrics.calibration.windows import Windows, named_texts
from dropformer.metrics.draft.acceptance import DenseText, shortest, spread
from dropformer.metrics.draft.formula import PAYS, Verify, best, curve
from dropformer.metrics.draft.search import Candidate, DraftSearch, Rung, draft_in_place
from dropformer.metrics.repair.base import Repair
from dropformer.progress import Progress
from dropformer.prune.architecture import Layer
from dropformer.prune.choosing import unprotected
from dropformer.prune.discovery.proof import outline as proven_outline
from dropformer.prune.errors import ModelError
from dropformer.prune.outline import Outline
from dropformer.prune.plan import DraftRef, Plan, make_plan
from dropformer.prune.samples.inputs import writes_text
from dropformer.prune.spec import named_layers
from dropformer.prune.window import Window
from dropformer.recipes.opening import LoadedModel

Repaired = Callable[[Plan], tuple[Plan, Repair]]
"""Repairs what a plan drops, and notes that in it."""

PLACES = 4  # places in the second half of each window, near the context that was asked for


@dataclass(frozen=True)
class DraftFound:
    """The best draft of a search.

    steps: timed on this machine (hardware cpu, batch 1 only); verify: estimated cost of a verifying pass in dense
    steps; tried: number of drafts measured; curve: expected speed-up by number of drafted tokens; repair: of the
    draft, None if there is none or it did not help; repaired: the draft before and after one.
    """

    plan: Plan
    best: Candidate
    estimated: Candidate
    verify: float
    steps: MeasuredSteps | None
    tried: int
    curve: dict[int, float]
    repair: Repair | None = None
    repaired: tuple[Candidate, Candidate] | None = None

    @property
    def pays(self) -> bool:
        return self.best.speedup >= PAYS


def choose_draft(
    opened: LoadedModel,
    options: DraftOptions,
    data: Sequence[Windows],
    keep: Sequence[int],
    progress: Progress,
    repaired: Repaired | None = None,
) -> DraftFound:
    """The plan and the number of drafted tokens with the most tokens per second.

    `repaired`: repairs the draft that is found, if it drops layers; the repair is kept if the draft is then faster.
    Time: two forward passes for rankings, one over the windows, and a few passes of DEPTH tokens per draft.  Raises
    ModelError, PlanError, CalibrationError or EvaluationError.
    """
    length, outline = shortest(data), proven_outline(opened.model)
    if not writes_text(opened.model) or len(outline.stacks) != 1:
        raise ModelError(f"{opened.ref.name} is no decoder of one stack, and only such a model drafts for itself")
    device = hardware(options.hardware)
    dtype = str(opened.model.dtype).removeprefix("torch.")
    workload = Workload(options.context, options.batch, 1, dtype)
    kernels = "sdpa" if options.hardware == "cpu" else "fused"
    steps = Steps(cost_of(opened.model), device, workload, kernels)
    with progress.stage("ranking layers"):
        rungs = rankings(opened, options, keep, outline, data, progress)
    longest = max(max(windows.lengths()) for windows in data)
    if longest < options.context:
        progress.say(
            f"acceptance is measured within {longest:,} tokens, all that the texts have; costs are at --context"
        )
    with progress.stage(f"reading {sum(map(len, data))} windows of up to {longest:,} tokens"):
        text = DenseText(opened.model, data, spread(length, PLACES, length // 2), options.temperature)
    search = DraftSearch(text, outline, steps.draft, steps.verify, options.most)
    with progress.stage("measuring drafts") as tick:
        found = search(rungs, tick)
    plan, repair, pair, timed = _plan(opened, outline, options, found, data, keep), None, None, None
    if repaired and not found.layers:
        progress.say("the draft drops no layer, so there is nothing to repair")
    if repaired and found.layers:
        fitted, new = repaired(plan)
        pair = found, search.measured(found.layers, found.windows, new)
        if pair[1].speedup > found.speedup:
            plan, repair, found = fitted, new, pair[1]
    if options.hardware == "cpu" and options.batch == 1 and length >= options.context:
        with progress.stage("timing the draft"):
            models = (opened.model, *draft_in_place(opened.model, outline, found.layers, found.windows, repair))
            timed = measured_steps(models, text.rows[0], text.kept[0][0], found.tokens)
    scale = timed.verify_cost / steps.verify(found.tokens + 1) if timed else 1.0

    def verify(tokens: int) -> float:
        """The cost of verifying, scaled from the number of tokens that was timed."""
        return scale * steps.verify(tokens)

    final = found if timed is None else _at_cost(found, timed.cost, verify)
    plan = plan.model_copy(update={"draft": _ref(options, final)})
    expected = curve(final.acceptance, final.cost, verify)
    verified = steps.verify(found.tokens + 1)
    return DraftFound(plan, final, found, verified, timed, len(search.tried), expected, repair, pair)


def _at_cost(found: Candidate, cost: float, verify: Verify) -> Candidate:
    """The candidate at this cost of a step, with its best number of drafted tokens."""
    tokens, gives = best(found.acceptance, cost, verify)
    return replace(found, cost=cost, tokens=tokens, speedup=gives)


def rankings(
    opened: LoadedModel,
    options: DraftOptions,
    keep: Sequence[int],
    outline: Outline,
    data: Sequence[Windows],
    progress: Progress,
) -> list[Rung]:
    """Rankings on a few windows of each text: by similarity for drops, by the loss under a window for windows."""
    wanted, found = parse_rungs(options.rungs), []
    stack = outline.stacks[0].name
    similarity: dict[Layer, float] = {}
    if options.most != 0 and any(isinstance(rung, str) for rung in wanted):
        batches = [{"input_ids": windows.ids[:1, : min(1024, windows.lengths()[0])]} for windows in data]
        similarity = analyze_model(opened.model, batches, ref=opened.ref).similarity()
    for rung in wanted:
        if isinstance(rung, Window):
            short = min(shortest(data), TIMES * rung.width)
            if short <= rung.width + rung.sinks:
                progress.say(f"window:{rung} is left out: it holds all of a text of {short:,} tokens")
                continue
            batches = [{"input_ids": windows.ids[:1, :short]} for windows in data]
            losses = window_losses(opened.model, outline, batches, rung, stack)
            kept = set(unprotected(outline, ("attn",), stack, keep))
            order = sorted((layer for layer in losses if layer in kept), key=lambda layer: losses[layer])
            found.append(Rung(f"window:{rung}", tuple(order), rung))
        elif similarity:
            free = unprotected(outline, (rung,), stack, keep)
            found.append(Rung(rung, tuple(sorted(free, key=lambda layer: (-similarity[layer], -layer.index)))))
    return found


def _ref(options: DraftOptions, found: Candidate) -> DraftRef:
    return DraftRef(
        tokens=found.tokens, acceptance=found.acceptance, cost=found.cost, speedup=found.speedup,
        temperature=options.temperature, context=options.context, batch=options.batch,
    )  # fmt: skip


def _plan(
    opened: LoadedModel,
    outline: Outline,
    options: DraftOptions,
    found: Candidate,
    data: Sequence[Windows],
    keep: Sequence[int],
) -> Plan:
    fields: dict[str, Any] = {"keep": list(keep), "metric": "draft", "calibration": named_texts(data)}
    return make_plan(
        outline,
        opened.ref,
        named_layers(found.layers, found.windows),
        list(found.layers),
        rungs=found.windows,
        **fields,
    )
