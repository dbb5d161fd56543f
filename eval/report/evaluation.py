"""`prune evaluate`: tasks, perplexity, probes, speed and memory of a dense model and its pruned versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from dropformer.eval.cost.memory import kv_bytes_per_token, parameter_bytes, parameter_count
from dropformer.eval.cost.speed import measure, quick
from dropformer.eval.cost.streaming import stream, streaming_speed
from dropformer.eval.quality.cliff import trend
from dropformer.eval.quality.perplexity import all_side_by_side, perplexity, tokens_read
from dropformer.eval.quality.probes import run_probes
from dropformer.eval.report.at_length import at_length
from dropformer.eval.report.prepare import Candidate, EvaluationOptions, Inputs, prepare
from dropformer.eval.report.results import Evaluation, ModelResult
from dropformer.eval.report.warnings import warnings
from dropformer.eval.tasks.paired import Paired
from dropformer.eval.tasks.results import compare_tasks
from dropformer.metrics.analysis.distributed import rank
from dropformer.metrics.calibration.windows import Windows
from dropformer.progress import Progress, Silent, Tick
from dropformer.prune.errors import reason
from dropformer.prune.loading.device import input_device

__all__ = ["Candidate", "Evaluation", "EvaluationOptions", "ModelResult", "evaluate"]

TIMED = 9
"""Single tokens timed after a full window, cached and recomputed; the first is a warm-up."""


def evaluate(models: Sequence[Candidate], options: EvaluationOptions, progress: Progress | None = None) -> Evaluation:
    """Evaluate models side by side; the first is the dense one.

    All models get the same questions, windows and prompts; speeds are interleaved.  Of several processes launched
    together, all answer questions and only the first measures the rest.  Raises EvaluationError.
    """
    progress = progress or Silent()
    inputs = prepare(models, options)
    results = [_sizes(candidate) for candidate in models]
    results = _with_tasks(results, models, options, progress)
    if rank() > 0:
        return Evaluation(models=results)
    results = _with_perplexity(results, models, inputs.text, progress)
    results = _with_probes(results, models, options, progress)
    results, device, said = _with_speed(results, models, options, progress)
    results = _with_stream(results, models, inputs, progress)
    if inputs.long:
        results = at_length(results, models, inputs.long, options.long, progress)
    text = inputs.text.ref.model_dump() if inputs.text else None
    return Evaluation(text=text, device=device, models=results, warnings=[*warnings(results), *said])


def _sizes(candidate: Candidate) -> ModelResult:
    model = candidate.model
    return ModelResult(
        name=candidate.name,
        drops=[str(layer) for layer in candidate.plan.layers] if candidate.plan else [],
        parameters=parameter_count(model),
        parameter_bytes=parameter_bytes(model),
        kv_bytes_per_token=kv_bytes_per_token(model),
    )


def _update(result: ModelResult, **fields: Any) -> ModelResult:
    return result.model_copy(update=fields)


def _with_tasks(
    results: list[ModelResult], models: Sequence[Candidate], options: EvaluationOptions, progress: Progress
) -> list[ModelResult]:
    if not options.tasks:
        return results
    from dropformer.eval.tasks.tasks import evaluate_tasks  # imports lm-eval, which takes seconds

    found = []
    for candidate in models:
        with progress.stage(f"{', '.join(options.tasks)}, in %: {candidate.name}", 100) as show:
            told = partial(_percent, show)
            found.append(
                evaluate_tasks(candidate.model, candidate.tokenizer, options.tasks, options.task_options, told)
            )
    pairs: list[dict[str, Paired]] = [{}, *(compare_tasks(found[0], other) for other in found[1:])]
    return [_update(r, tasks=t, paired=p) for r, t, p in zip(results, found, pairs, strict=True)]


def _percent(show: Tick, done: int, asked: int) -> None:
    show(100 * done // asked, 0)


def _with_perplexity(
    results: list[ModelResult], models: Sequence[Candidate], data: Windows | None, progress: Progress
) -> list[ModelResult]:
    if data is None:
        return results
    (dense, *pruned), out = models, list(results)
    if not pruned:
        with progress.stage(f"perplexity: {dense.name}{tokens_read(dense.model, data.ids, data.partly_scored)}"):
            return [_update(out[0], perplexity=asdict(perplexity(dense.model, data.ids, data.partly_scored)))]
    read = tokens_read(dense.model, data.ids, data.partly_scored)
    with progress.stage(f"perplexity and KL, all models on each window{read}"):
        found = all_side_by_side(dense.model, [candidate.model for candidate in pruned], data.ids, data.partly_scored)
    out[0] = _update(out[0], perplexity=asdict(found[0].dense))
    for i, (candidate, both) in enumerate(zip(pruned, found, strict=True), start=1):
        out[i] = _update(out[i], perplexity=asdict(both.pruned), kl=asdict(both.divergence))
        if candidate.plan:
            with progress.stage(f"trend of the first drops alone: {candidate.name}"):
                out[i] = _update(out[i], trend=trend(dense.model, candidate.plan, data, both))
    return out


def _with_probes(
    results: list[ModelResult], models: Sequence[Candidate], options: EvaluationOptions, progress: Progress
) -> list[ModelResult]:
    if not options.probes:
        return results
    out = []
    for result, candidate in zip(results, models, strict=True):
        with progress.stage(f"probes: {candidate.name}"):
            found = run_probes(candidate.model, candidate.tokenizer)
        out.append(_update(result, probes=[asdict(probe) for probe in found]))
    return out


def _with_speed(
    results: list[ModelResult], models: Sequence[Candidate], options: EvaluationOptions, progress: Progress
) -> tuple[list[ModelResult], str | None, list[str]]:
    """Results with speeds, the device and settings, and errors of torch.compile, if any."""
    if not options.speed and not options.seconds:
        return results, None, []
    named = {candidate.name: candidate.model for candidate in models}
    with progress.stage("speed, interleaved"):
        found = measure(named, options.speed, options.repeats) if options.speed else quick(named, options.seconds)
    tables, said = [found], []
    on_gpu = input_device(models[0].model).type == "cuda"
    if options.speed and (on_gpu if options.compile is None else options.compile):
        with progress.stage("speed, decoding through torch.compile"):
            try:
                tables.append(measure(named, options.speed, options.repeats, compile=True))
            except Exception as error:  # compilers raise any type; the eager figures remain valid
                said.append(f"torch.compile failed ({type(error).__name__}: {reason(error, 120)})")
    rows = {
        name: [
            {**asdict(row), "compiled": table.compiled} for table in tables for row in table.rows if row.model == name
        ]
        for name in named
    }
    where = f"{found.device}, {found.threads} threads, {found.dtype}, {found.rows[0].repeats} repeats"
    return [_update(r, speed=rows[c.name]) for r, c in zip(results, models, strict=True)], where, said


def _with_stream(
    results: list[ModelResult], models: Sequence[Candidate], inputs: Inputs, progress: Progress
) -> list[ModelResult]:
    ids, shape = inputs.stream, inputs.shape
    if ids is None or shape is None:
        return results
    out = []
    for result, candidate in zip(results, models, strict=True):
        with progress.stage(f"streaming {len(ids)} tokens: {candidate.name}", len(ids)) as tick:
            read = stream(candidate.model, ids, shape, progress=tick)
        found = {**asdict(read), "perplexity": read.perplexity, "tokens_per_second": read.tokens_per_second}
        if len(ids) > shape.size + TIMED:
            with progress.stage(f"streaming against recomputing the window: {candidate.name}"):
                one = streaming_speed(candidate.model, ids, shape, TIMED - 1)
            found |= {"seconds_per_token": asdict(one), "speedup_over_recompute": one.speedup}
        out.append(_update(result, stream=found))
    return out
