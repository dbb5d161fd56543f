"""`prune evaluate`: tasks, perplexity, probes, speed and memory of a dense model and its pruned forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from dropformer.eval.memory import kv_bytes_per_token, parameter_bytes, parameter_count
from dropformer.eval.page import Section, page, paragraph, picture, table
from dropformer.eval.paired import Paired
from dropformer.eval.perplexity import side_by_side
from dropformer.eval.probes import run_probes
from dropformer.eval.sinks import Sinks
from dropformer.eval.speed import Setting, SpeedTable, measure, quick
from dropformer.eval.streaming import stream
from dropformer.eval.tasks import TaskOptions, TaskResults, compare_tasks, evaluate_tasks
from dropformer.metrics.calibration import Calibration
from dropformer.metrics.windows import Windows, windows
from dropformer.prune.artifact import Artifact, Part
from dropformer.prune.errors import EvaluationError
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
    """A model to evaluate, with its name and tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: Any


def evaluate(models: Sequence[Candidate], options: EvaluationOptions, watcher: Watcher | None = None) -> Evaluation:
    """Evaluate models side by side; the first is the dense one.

    Everything sees the same questions, windows and prompts; speeds are interleaved.  Raises EvaluationError.
    """
    watcher = watcher or Watcher()
    if len(models) < 1:
        raise EvaluationError("evaluate needs the dense model, and usually pruned ones after it")
    data = windows(options.text, models[0].tokenizer) if options.text else None
    results = [_sizes(candidate) for candidate in models]
    results = _with_tasks(results, models, options, watcher)
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
        with watcher.stage(f"{', '.join(options.tasks)}: {candidate.name}"):
            found.append(evaluate_tasks(candidate.model, candidate.tokenizer, options.tasks, options.task_options))
    pairs: list[dict[str, Paired]] = [{}, *(compare_tasks(found[0], other) for other in found[1:])]
    return [_update(r, tasks=t, paired=p) for r, t, p in zip(results, found, pairs, strict=True)]


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
    data = windows(Calibration(name, samples=1, length=options.stream), models[0].tokenizer)
    out = []
    for result, candidate in zip(results, models, strict=True):
        with watcher.stage(f"streaming {options.stream} tokens: {candidate.name}"):
            read = stream(candidate.model, data.ids[0], Sinks())
        out.append(_update(result, stream={**asdict(read), "perplexity": read.perplexity}))
    return out


def warnings(results: Sequence[ModelResult]) -> list[str]:
    """What a reader of the table might miss: probes that broke although tasks or perplexity held."""
    lines = []
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


Row = tuple[str, ...]


def rows(evaluation: Evaluation) -> tuple[list[str], list[Row]]:
    """The table of an evaluation: a column a model, a row a measurement."""
    models = evaluation.models
    body: list[Row] = [
        ("parameters", *(f"{m.parameters:,}" for m in models)),
        ("KV bytes per token", *(f"{m.kv_bytes_per_token:,}" for m in models)),
    ]
    if models[0].perplexity:
        body.append(("perplexity", *(f"{m.perplexity['value']:.3f}" if m.perplexity else "" for m in models)))
        body.append(
            ("KL to dense, nats", *(f"{m.kl['value']:.4f} ± {m.kl['stderr']:.4f}" if m.kl else "" for m in models))
        )
    for name in models[0].tasks.named if models[0].tasks else ():
        body.append((name, *(_task_cell(m, name) for m in models)))
        body.append((f"{name}, retained", *(_paired_cell(m, name) for m in models)))
    for i, probe in enumerate(models[0].probes):
        body.append((f"probe: {probe['name']}", *(f"{m.probes[i]['accuracy']:.0%}" for m in models)))
    for i, row in enumerate(models[0].speed):
        where = f"batch {row['setting']['batch']}, {row['setting']['prompt']} + {row['setting']['new']}"
        for part in ("prefill", "decode"):
            body.append((f"{part} tokens/s ({where})", *(f"{m.speed[i][part]['median']:.1f}" for m in models)))
            body.append((f"{part} ratio; work allows", *(_ratio_cell(m.speed[i], part) for m in models)))
    if models[0].stream:
        label = f"perplexity over {models[0].stream['tokens']:,} streamed tokens"
        body.append((label, *(f"{m.stream['perplexity']:.3f}" if m.stream else "" for m in models)))
    return ["", *(m.name for m in models)], body


def _task_cell(model: ModelResult, name: str) -> str:
    result = model.tasks.tasks[name] if model.tasks else None
    if result is None or result.value is None:
        return ""
    return f"{result.value:.4f}" + (f" ± {result.stderr:.4f}" if result.stderr is not None else "")


def _paired_cell(model: ModelResult, name: str) -> str:
    paired = model.paired.get(name)
    if paired is None or paired.retained is None:
        return ""
    return f"{paired.retained:.1%} (p = {paired.p_value:.3g})"


def _ratio_cell(row: dict[str, Any], part: str) -> str:
    return f"{row[f'{part}_ratio']['median']:.2f}; {row[f'bound_{part}']:.2f}"


def html(evaluation: Evaluation, pictures: Sequence[tuple[Path, str]] = ()) -> str:
    """The evaluation as one self-contained page."""
    head, body = rows(evaluation)
    parts = [table(head, body)]
    if evaluation.text:
        text = evaluation.text
        parts.append(
            paragraph(f"Perplexity on {text['samples']} windows of {text['length']} tokens of {text['name']}.")
        )
    if evaluation.device:
        parts.append(paragraph(f"Speed on {evaluation.device}: medians, models interleaved in one run."))
    sections = [Section("Side by side", parts)]
    if evaluation.warnings:
        sections.append(Section("Where it hurts", [paragraph(line) for line in evaluation.warnings]))
    if pictures:
        sections.append(Section("Pictures", [picture(path, alt, alt) for path, alt in pictures]))
    title = f"{evaluation.models[0].name}: what dropping layers cost and saved"
    return page(title, sections, f"{len(evaluation.models)} models on the same questions, text and prompts.")
