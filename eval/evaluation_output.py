"""An evaluation as a table on the terminal and as one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dropformer.eval.evaluation import Evaluation, ModelResult
from dropformer.eval.page import Section, page, paragraph, picture, table

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
        body += _stream_rows([m.stream or {} for m in models])
    return ["", *(m.name for m in models)], body


def _stream_rows(streams: Sequence[dict[str, Any]]) -> list[Row]:
    """Perplexity past the context, how flat it is, what the cache holds, and the speed-up over recomputing."""
    tokens, quarters = streams[0]["tokens"], [_quarters(s["segments"]) for s in streams]
    found: list[Row] = [
        (f"perplexity over {tokens:,} streamed tokens", *(f"{s['perplexity']:.3f}" for s in streams)),
        ("its four quarters", *(" ".join(f"{value:.1f}" for value in part) for part in quarters)),
        ("most bytes in the cache", *(f"{s['cache_bytes']:,}" for s in streams)),
    ]
    if "speedup_over_recompute" in streams[0]:
        faster = (f"{s['speedup_over_recompute']:.1f}x" for s in streams)
        found.append(("a token, against recomputing the window", *faster))
    return found


def _quarters(segments: Sequence[float]) -> list[float]:
    """Perplexity of four equal parts, from that of more."""
    logs, size = [math.log(s) for s in segments], max(1, len(segments) // 4)
    parts = [logs[i : i + size] for i in range(0, len(logs), size)]
    return [math.exp(sum(part) / len(part)) for part in parts]


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
