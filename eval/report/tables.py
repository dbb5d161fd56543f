"""An evaluation as rows of text: one column per model; for speed and subjects one row per model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from dropformer.eval.quality.perplexity import plus_minus
from dropformer.eval.report.evaluation import Evaluation, ModelResult
from dropformer.prune.architecture import KIND_NAMES

NOISE = " (noise: more than work allows)"
Row = tuple[str, ...]
Table = tuple[list[str], list[Row]]


def summary(evaluation: Evaluation) -> Table:
    """The terminal's table of all figures."""
    head, body = quality(evaluation)
    rows = [*body, *_speed_rows(evaluation.models), *streaming(evaluation)[1], *long(evaluation)[1]]
    return head, rows


def quality(evaluation: Evaluation) -> Table:
    """Sizes, perplexity, tasks with their groups, and probes."""
    models = evaluation.models
    body: list[Row] = [
        ("layers dropped", *(dropped(m) for m in models)),
        ("parameters", *(f"{m.parameters:,}" for m in models)),
        ("KV bytes per token", *(f"{m.kv_bytes_per_token:,}" for m in models)),
    ]
    if models[0].perplexity:
        body.append(("perplexity", *(_perplexity_cell(m) for m in models)))
        body.append(("KL to dense, nats", *(_plus_minus(m.kl, 4) for m in models)))
    for name in models[0].tasks.named if models[0].tasks else ():
        body.append((name, *(_task_cell(m, name) for m in models)))
        body.append(("  retained (McNemar's p)", *(_paired_cell(m, name) for m in models)))
        body += [(f"  {group}", *(_task_cell(m, group) for m in models)) for group in _groups(models[0], name)]
    for probe in models[0].probes:
        label = f"probe: {probe['name']} (chance {probe['chance']:.0%})"
        body.append((label, *(_probe_cell(m, probe["name"]) for m in models)))
    return ["", *(m.name for m in models)], [row for row in body if any(row[1:])]


def dropped(model: ModelResult) -> str:
    """Such as `8 attention`; empty for the dense model, or if unknown."""
    counts = Counter(layer.rpartition(":")[0].rpartition(".")[2] for layer in model.drops)
    return ", ".join(f"{count} {KIND_NAMES[kind]}" for kind, count in counts.items())


def speed(evaluation: Evaluation) -> Table:
    """A row per setting and model: medians with quartiles, ratio to dense, and the upper bound of the ratio."""
    head = [
        "setting",
        "model",
        "prefill tokens/s",
        "ratio",
        "allowed",
        "decode tokens/s",
        "ratio",
        "allowed",
        "KV cache",
        "peak",
    ]
    return head, [
        (setting_name(row), row["model"], *_speed_cells(row, "prefill"), *_speed_cells(row, "decode"), *_memory(row))
        for rows in zip(*(m.speed for m in evaluation.models), strict=True)
        for row in rows
    ]


def setting_name(row: dict[str, Any]) -> str:
    setting = row["setting"]
    form = ", compiled" if row.get("compiled") else ""
    return f"batch {setting['batch']}, {setting['prompt']} + {setting['new']}{form}"


def subjects(evaluation: Evaluation) -> Table:
    """Every subtask of the named tasks: questions, each model's score, and answers lost and gained."""
    head, first = ["", "questions", *(m.name for m in evaluation.models)], evaluation.models[0].tasks
    below = {name: task for name, task in first.tasks.items() if name not in first.named} if first else {}
    return head, [
        (task.alias, str(task.questions), *(_subject_cell(m, name) for m in evaluation.models))
        for name, task in below.items()
    ]


def streaming(evaluation: Evaluation) -> Table:
    """Perplexity past the context, by quarter, cache size, and speed-up over recomputing the window."""
    streams = [m.stream or {} for m in evaluation.models]
    head = ["", *(m.name for m in evaluation.models)]
    if not streams[0]:
        return head, []
    quarters = [_quarters(s["segments"]) for s in streams]
    body: list[Row] = [
        (f"perplexity over {streams[0]['tokens']:,} streamed tokens", *(f"{s['perplexity']:.3f}" for s in streams)),
        ("  its four quarters", *(" ".join(f"{value:.1f}" for value in part) for part in quarters)),
        ("  tokens/s", *(f"{s['tokens_per_second']:,.1f}" for s in streams)),
        ("  most the cache held", *(mebibytes(s["cache_bytes"]) for s in streams)),
    ]
    if "speedup_over_recompute" in streams[0]:
        faster = (f"{s['speedup_over_recompute']:.1f}x" for s in streams)
        body.append(("  a token, against recomputing the window", *faster))
    return head, body


def long(evaluation: Evaluation) -> Table:
    """Perplexity by position, the needle's accuracy by depth, the cache and decoding at length."""
    found = [m.long or {} for m in evaluation.models]
    head = ["", *(m.name for m in evaluation.models)]
    if not found[0]:
        return head, []
    body: list[Row] = []
    for rows in zip(*(one["bands"] for one in found), strict=True):
        label = f"perplexity, positions {rows[0]['start']:,} to {rows[0]['stop'] - 1:,}"
        body.append((label, *(_band_cell(row) for row in rows)))
    if len(found) > 1:
        body.append(("  within and beyond its windows", "", *(_beyond_cell(one.get("beyond")) for one in found[1:])))
    needles = [one["needle"] for one in found]
    label = f"needle: {needles[0]['facts']} facts asked for again"
    body.append((label, *(f"{n['accuracy']:.0%} ± {n['stderr']:.0%}, {n['logprob']:.2f} nats" for n in needles)))
    body.append(
        ("  at 10, 30, 50, 70, 90% of the text", *(" ".join(f"{x:.0%}" for x in n["by_depth"]) for n in needles))
    )
    body.append(
        ("  of the answers' tokens", *(f"{n.get('tokens', 0):.0%} ± {n.get('tokens_stderr', 0):.0%}" for n in needles))
    )
    speeds = [one["decoding"] for one in found]
    body.append((f"KV cache at {found[0]['context']:,} tokens", *(mebibytes(one["kv_bytes"]) for one in found)))
    body.append(("  decode tokens/s", *(f"{one['speed']['median']:,.1f}" for one in speeds)))
    body.append(("    ratio; bytes allow", *(_decode_cell(one) for one in speeds)))
    return head, body


def _band_cell(row: dict[str, Any]) -> str:
    ratio = "" if row["lost"] is None else f" ({math.exp(min(700.0, row['lost'])):.3f}x)"
    return f"{row['perplexity']:.3f}{ratio}"


def _beyond_cell(beyond: dict[str, Any] | None) -> str:
    if not beyond:
        return ""
    return "; ".join(f"{math.exp(min(700.0, beyond[part]['lost'])):.3f}x" for part in ("within", "past"))


def _decode_cell(row: dict[str, Any]) -> str:
    ratio, bound = row["ratio"], row["bound"]
    noise = NOISE if ratio["median"] > bound else ""
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]{noise}; {bound:.2f}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"


def _speed_rows(models: Sequence[ModelResult]) -> Iterator[Row]:
    for rows in zip(*(m.speed for m in models), strict=True):
        yield (setting_name(rows[0]), *("" for _ in rows))
        for part in ("prefill", "decode"):
            cells = [_speed_cells(row, part) for row in rows]
            yield (f"  {part} tokens/s", *(speed for speed, _, _ in cells))
            yield ("    ratio; work allows", *(f"{ratio}; {bound}" for _, ratio, bound in cells))
        yield ("  KV cache; peak memory", *("; ".join(_memory(row)) for row in rows))


def _speed_cells(row: dict[str, Any], part: str) -> Row:
    """The median with half the interquartile range, the ratio with quartiles, and its bound."""
    found, ratio, bound = row[part], row[f"{part}_ratio"], row[f"bound_{part}"]
    spread = (found["high"] - found["low"]) / 2 / found["median"]
    return (
        f"{found['median']:,.1f} ±{spread:.0%}",
        f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" + (NOISE if ratio["median"] > bound else ""),
        f"{bound:.2f}",
    )


def _memory(row: dict[str, Any]) -> Row:
    return mebibytes(row["kv_bytes"]), mebibytes(row["peak"]["nbytes"])


def _groups(model: ModelResult, name: str) -> list[str]:
    """The subgroups of a named group, such as MMLU's categories."""
    tasks = model.tasks.tasks if model.tasks else {}
    return [member for member in tasks[name].members if tasks[member].members]


def _perplexity_cell(model: ModelResult) -> str:
    if not model.perplexity:
        return ""
    value, stderr = model.perplexity["value"], model.perplexity["stderr"]
    return plus_minus(value, None if stderr is None else value * stderr, 3)


def _plus_minus(found: dict[str, Any] | None, digits: int) -> str:
    return plus_minus(found["value"], found["stderr"], digits) if found else ""


def _probe_cell(model: ModelResult, name: str) -> str:
    found = next((probe for probe in model.probes if probe["name"] == name), None)
    return f"{found['accuracy']:.0%} ± {found['stderr']:.0%}" if found else ""


def _task_cell(model: ModelResult, name: str) -> str:
    result = model.tasks.tasks.get(name) if model.tasks else None
    if result is None or result.value is None:
        return ""
    return f"{result.value:.4f}" + (f" ± {result.stderr:.4f}" if result.stderr is not None else "")


def _subject_cell(model: ModelResult, name: str) -> str:
    paired = model.paired.get(name)
    changed = f" (-{paired.lost} +{paired.gained})" if paired and (paired.lost or paired.gained) else ""
    return _task_cell(model, name) + changed


def _paired_cell(model: ModelResult, name: str) -> str:
    paired = model.paired.get(name)
    if paired is None or paired.retained is None:
        return ""
    return paired.kept


def _quarters(segments: Sequence[float]) -> list[float]:
    """Perplexity of the four quarters, from that of more segments."""
    logs, size = [math.log(s) for s in segments], max(1, len(segments) // 4)
    parts = [logs[i : i + size] for i in range(0, len(logs), size)]
    return [math.exp(sum(part) / len(part)) for part in parts]
