"""An evaluation as one self-contained HTML page."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dropformer.eval.html import Section, page, paragraph, picture, table
from dropformer.eval.quality.sweep import Sweep, draw
from dropformer.eval.report import pictures as pictures
from dropformer.eval.report import tables as tables
from dropformer.eval.report.evaluation import Evaluation

Picture = tuple[Path, str]


def html(evaluation: Evaluation, depth: Sequence[Picture] = (), sweep: Sweep | None = None) -> str:
    """The page; `depth` are plots of similarity by depth with captions; `sweep` is the dense model's."""
    with tempfile.TemporaryDirectory() as scratch:
        sections = list(_sections(evaluation, Path(scratch), depth, sweep))
    count = len(evaluation.models)
    lead = f"{count} models on the same questions, text and prompts." if count > 1 else "One model, by itself."
    title = (
        f"{evaluation.models[0].name}: what dropping layers cost and saved" if count > 1 else evaluation.models[0].name
    )
    return page(title, sections, lead)


def _sections(
    evaluation: Evaluation, scratch: Path, depth: Sequence[Picture], sweep: Sweep | None
) -> Iterator[Section]:
    yield Section("Side by side", [table(*tables.quality(evaluation)), *map(paragraph, _measured_on(evaluation))])
    if evaluation.warnings:
        yield Section("Warnings", [paragraph(line) for line in evaluation.warnings])
    curve = pictures.quality_by_drop(evaluation, scratch / "quality.png")
    kept = pictures.kept_by_test(evaluation, scratch / "kept.png")
    swept = draw(sweep, scratch / "sweep.png") if sweep else None
    parts = [picture(path, says, says) for path, says in ((curve, CURVE), (swept, SWEPT), (kept, KEPT)) if path]
    if parts:
        yield Section("Quality against drop", parts)
    if depth:
        yield Section("Layer by layer", [picture(path, says, says) for path, says in depth])
    if evaluation.models[0].speed:
        drawn = pictures.speed_against_bound(evaluation, scratch / "speed.png")
        shown = [picture(drawn, SPEED, SPEED)] if drawn else []
        where = paragraph(f"On {evaluation.device}. {TIMES}")
        yield Section("Speed and memory", [*shown, table(*tables.speed(evaluation)), where])
    if (streamed := tables.streaming(evaluation))[1]:
        yield Section("Beyond the context", [table(*streamed), paragraph(STREAMED)])
    if (far := tables.long(evaluation))[1]:
        yield Section("At length", [table(*far), paragraph(LONG)])
    if (subjects := tables.subjects(evaluation))[1]:
        yield Section("Task by task", [table(*subjects), paragraph(SUBJECTS)])


CURVE = (
    "Perplexity over dense. Diamonds: the models, on all windows. Dashed: the first quarter, half and three quarters "
    "of each plan's drops, on two windows, to detect a cliff."
)
SWEPT = "Every number of drops, most redundant first: perplexity over dense, and the speed-up of decoding."
KEPT = (
    "Tasks are compared per question (paired standard errors); probes have 12 to 32 questions each, and their "
    "standard errors combine both models."
)
SPEED = "Dots: measured, with quartiles. Bars: upper bounds from FLOPs (prefill) and bytes read (decode)."
TIMES = "Medians with half the interquartile range, ratios with quartiles; models interleaved in one run."
STREAMED = (
    "The cache holds the first four tokens and a rolling window; positions are counted inside the cache "
    "(arXiv 2309.17453)."
)
LONG = (
    "Perplexity by position in the text, over dense in brackets; the windows are those of the model's layers, or 1,024 "
    "tokens if it has none. A fact is found if every token of its answer is the argmax. Decoding is interleaved, with "
    "quartiles in brackets."
)
SUBJECTS = "In brackets: questions that only the dense model (-) or only the pruned one (+) answers correctly."


def _measured_on(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.text:
        text = evaluation.text
        yield f"Perplexity and KL on {text['samples']} windows of {text['length']} tokens of {text['name']}."
    tasks = evaluation.models[0].tasks
    if tasks:
        stats = tasks.stats
        work = f" {stats['computed']:,} tokens computed for {stats['needed']:,} requested." if stats else ""
        if stats and not stats["requests"]:
            work = " All answers were cached by an earlier run."
        yield f"Tasks by lm-eval {tasks.lm_eval}, {tasks.backend} backend, seed {tasks.seed}.{work}"
