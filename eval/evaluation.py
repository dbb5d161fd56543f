"""`prune evaluate`: tasks, perplexity, probes, speed and memory of a dense model and its pruned forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar

from transformers import PreTrainedModel

from dropformer.eval.memory import kv_bytes_per_token, parameter_bytes, parameter_count
from dropformer.eval.paired import Paired
from dropformer.eval.perplexity import side_by_side
from dropformer.eval.probes import run_probes
from dropformer.eval.sinks import fitting
from dropformer.eval.speed import Setting, SpeedTable, measure, quick
from dropformer.eval.streaming import stream, streaming_speed
from dropformer.eval.tasks import TaskOptions, TaskResults, compare_tasks, evaluate_tasks
from dropformer.eval.trend import Trend, trend
from dropformer.metrics.calibration import Calibration
from dropformer.metrics.distributed import rank
from dropformer.metrics.windows import Windows, windows
from dropformer.prune.artifact import Artifact, Part
from dropformer.prune.errors import EvaluationError
from dropformer.prune.plan import Plan
from dropformer.watcher import Watcher


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate.

    text: windows for perplexity and KL (None: neither).  speed: settings to measure; empty with
    `seconds` > 0 chooses one that takes about that long.  stream: tokens of text to read past the
    context with attention sinks (0: none).
    """

    tasks: tuple[str, ...] = ()
    task_options: TaskOptions = field(default_factory=TaskOptions)
    text: Calibration | None = None
    probes: bool = False
    speed: tuple[Setting, ...] = ()
    seconds: float = 0.0
    repeats: int = 5
    stream: int = 0


TIMED = 9
"""Single tokens timed behind a full window, cached and recomputed, one of them to warm up."""


class ModelResult(Part):
    """One model's measurements; `paired` compares it with the dense model, question by question."""

    name: str
    parameters: int
    parameter_bytes: int
    kv_bytes_per_token: int
    tasks: TaskResults | None = None
    paired: dict[str, Paired] = {}
    perplexity: dict[str, Any] | None = None
    kl: dict[str, Any] | None = None
    trend: Trend | None = None
    probes: list[dict[str, Any]] = []
    speed: list[dict[str, Any]] = []
    stream: dict[str, Any] | None = None


class Evaluation(Artifact):
    """report.json of an evaluation: the dense model first, then the pruned ones."""

    kind: ClassVar[str] = "evaluation"

    text: dict[str, Any] | None = None
    device: str | None = None
    models: list[ModelResult]
    warnings: list[str] = []


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, with its name and tokenizer; `plan`: how it was made from the dense one, if known."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    plan: Plan | None = None


def evaluate(models: Sequence[Candidate], options: EvaluationOptions, watcher: Watcher | None = None) -> Evaluation:
    """Evaluate models side by side; the first is the dense one.

    Everything sees the same questions, windows and prompts; speeds are interleaved.  Of several processes
    launched together all answer questions and only the first measures the rest.  Raises EvaluationError.
    """
    watcher = watcher or Watcher()
    if len(models) < 1:
        raise EvaluationError("evaluate needs the dense model, and usually pruned ones after it")
    data = windows(options.text, models[0].tokenizer) if options.text else None
    results = [_sizes(candidate) for candidate in models]
    results = _with_tasks(results, models, options, watcher)
    if rank() > 0:
        return Evaluation(models=results)
    results = _with_perplexity(results, models, data, watcher)
    results = _with_probes(results, models, options, watcher)
    results, device = _with_speed(results, models, options, watcher)
    results = _with_stream(results, models, options, watcher)
    text = data.ref.model_dump() if data else None
    return Evaluation(text=text, device=device, models=results, warnings=warnings(results))


def _sizes(candidate: Candidate) -> ModelResult:
    model = candidate.model
    return ModelResult(
        name=candidate.name,
        parameters=parameter_count(model),
        parameter_bytes=parameter_bytes(model),
        kv_bytes_per_token=kv_bytes_per_token(model),
    )


def _update(result: ModelResult, **fields: Any) -> ModelResult:
    return result.model_copy(update=fields)


def _with_tasks(
    results: list[ModelResult], models: Sequence[Candidate], options: EvaluationOptions, watcher: Watcher
) -> list[ModelResult]:
    if not options.tasks:
        return results
    found = []
    for candidate in models:
        with watcher.stage(f"{', '.join(options.tasks)}, in %: {candidate.name}", 100) as show:
            told = partial(_percent, show)
            found.append(
                evaluate_tasks(candidate.model, candidate.tokenizer, options.tasks, options.task_options, told)
            )
    pairs: list[dict[str, Paired]] = [{}, *(compare_tasks(found[0], other) for other in found[1:])]
    return [_update(r, tasks=t, paired=p) for r, t, p in zip(results, found, pairs, strict=True)]


def _percent(show: Callable[[int, int], None], done: int, asked: int) -> None:
    show(100 * done // asked, 0)


def _with_perplexity(
    results: list[ModelResult], models: Sequence[Candidate], data: Windows | None, watcher: Watcher
) -> list[ModelResult]:
    if data is None:
        return results
    dense, out = models[0], list(results)
    for i, candidate in enumerate(models[1:] or models, start=1 if models[1:] else 0):
        with watcher.stage(f"perplexity and KL: {candidate.name}"):
            both = side_by_side(dense.model, candidate.model, data.ids)
        out[0] = _update(out[0], perplexity=asdict(both.dense))
        out[i] = _update(out[i], perplexity=asdict(both.pruned), kl=asdict(both.divergence) if i else None)
        if candidate.plan:
            with watcher.stage(f"trend of the first drops alone: {candidate.name}"):
                out[i] = _update(out[i], trend=trend(dense.model, candidate.plan, data.ids))
    return out


def _with_probes(
    results: list[ModelResult], models: Sequence[Candidate], options: EvaluationOptions, watcher: Watcher
) -> list[ModelResult]:
    if not options.probes:
        return results
    out = []
    for result, candidate in zip(results, models, strict=True):
        with watcher.stage(f"probes: {candidate.name}"):
            found = run_probes(candidate.model, candidate.tokenizer)
        out.append(_update(result, probes=[asdict(probe) for probe in found]))
    return out


def _with_speed(
    results: list[ModelResult], models: Sequence[Candidate], options: EvaluationOptions, watcher: Watcher
) -> tuple[list[ModelResult], str | None]:
    if not options.speed and not options.seconds:
        return results, None
    named = {candidate.name: candidate.model for candidate in models}
    with watcher.stage("speed, interleaved"):
        found: SpeedTable = (
            measure(named, options.speed, options.repeats) if options.speed else quick(named, options.seconds)
        )
    rows = {name: [asdict(row) for row in found.rows if row.model == name] for name in named}
    where = f"{found.device}, {found.threads} threads, {found.dtype}, {found.rows[0].repeats} repeats"
    return [_update(r, speed=rows[c.name]) for r, c in zip(results, models, strict=True)], where


def _with_stream(
    results: list[ModelResult], models: Sequence[Candidate], options: EvaluationOptions, watcher: Watcher
) -> list[ModelResult]:
    if not options.stream:
        return results
    name = options.text.name if options.text else "heldout"
    ids = windows(Calibration(name, samples=1, length=options.stream), models[0].tokenizer).ids[0]
    shape = fitting(models[0].model)
    out = []
    for result, candidate in zip(results, models, strict=True):
        with watcher.stage(f"streaming {options.stream} tokens: {candidate.name}", options.stream) as progress:
            read = stream(candidate.model, ids, shape, progress=lambda done, show=progress: show(done, done))
        found = {**asdict(read), "perplexity": read.perplexity, "tokens_per_second": read.tokens_per_second}
        if len(ids) > shape.size + TIMED:
            with watcher.stage(f"streaming against recomputing the window: {candidate.name}"):
                one = streaming_speed(candidate.model, ids, shape, TIMED - 1)
            found |= {"seconds_per_token": asdict(one), "speedup_over_recompute": one.speedup}
        out.append(_update(result, stream=found))
    return out


def warnings(results: Sequence[ModelResult]) -> list[str]:
    """What a reader of the table might miss: a cliff, and probes that broke although tasks or perplexity held."""
    lines = [f"{r.name}: {r.trend}" for r in results if r.trend and r.trend.cliff is not None]
    dense = {probe["name"]: probe for probe in results[0].probes}
    for result in results[1:]:
        for probe in result.probes:
            before, fall = dense[probe["name"]], dense[probe["name"]]["accuracy"] - probe["accuracy"]
            if fall > 2 * (before["stderr"] ** 2 + probe["stderr"] ** 2) ** 0.5 and fall > 0.05:
                lines.append(
                    f"{result.name}: {probe['name']} falls from {before['accuracy']:.0%} to {probe['accuracy']:.0%}; "
                    "knowledge tests such as MMLU hold longer than generation, arithmetic and long context do"
                )
    return lines
