"""Dense and pruned side by side as terminal tables: from a report, and from a checkpoint's record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dropformer.prune.window import CONTEXT, KV_AT

if TYPE_CHECKING:
    from dropformer.eval.report.report import Report

PER_TOKEN = "kv_bytes_per_token"  # no row where layers have windows: only beyond the widest is a token's cache constant


def report_table(report: Report) -> Table:
    """Dense and pruned side by side."""
    table = Table(title=f"{report.model.name}: {report.spec}", title_justify="left")
    for name in ("", "dense", "pruned", "change"):
        table.add_column(name, justify="left" if not name else "right")
    for label, key, form in ROWS:
        before, after = getattr(report.dense, key), getattr(report.pruned, key)
        if before is not None and after is not None and not (key == PER_TOKEN and (report.kv_context or not before)):
            label = label.format(context=report.kv_context or 0)
            cells = (_spread(form(getattr(s, key)), getattr(s, f"{key}_stderr", None)) for s in report.sides)
            table.add_row(label, *cells, report.ratio(key) or relative_change(before, after))
    return table


def _spread(value: str, stderr: float | None) -> str:
    return value if stderr is None else f"{value} ± {stderr:.2f}"


def report_notes(report: Report, out: object = "OUT") -> list[str]:
    """How the numbers were measured, and what they do not show.  out: where the checkpoint is."""
    notes = []
    if report.text:
        text = report.text
        seen = "calibrated on too" if text.calibrated_on else "not calibrated on"
        notes.append(
            f"perplexity: {text.windows} windows of {text.length} tokens of `{text.name}`, {seen}; "
            f"KL(dense || pruned) {report.kl:.4f} nats per token"
        )
    if report.text and (context := report.context_not_read):
        notes.append(
            f"note: texts of {report.text.length} tokens do not tell what windows cost at {context:,}; "
            f"`prune evaluate {report.model.name} {out} --long {context}` does"
        )
    if report.outputs:
        notes += [str(report.outputs), "no perplexity and no decode speed: the model does not generate text"]
    if report.trend and report.trend.cliff is not None:
        notes.append(f"warning: {report.trend}")
    if report.speed:
        speed = report.speed
        notes.append(
            f"speed: {speed.device}, {speed.dtype}, batch {speed.batch}, {speed.prompt} + {speed.new} tokens, "
            f"interleaved; upper bounds: prefill {speed.prefill_bound:.2f}x, decode {speed.decode_bound:.2f}x"
        )
    return notes


def record_table(record: Mapping[str, Any]) -> Table:
    """A checkpoint's sizes from its dropformer.json."""
    table = Table(title=f"{record['model']['name']}: {record['spec']}", title_justify="left")
    for name in ("", "dense", "pruned", "change"):
        table.add_column(name, justify="left" if not name else "right")
    forms = {"parameters": "{:,}".format, "bytes": nbytes, PER_TOKEN: nbytes, KV_AT: nbytes}
    if record["before"].get(KV_AT):
        del forms[PER_TOKEN]
    names = {"bytes": "checkpoint", PER_TOKEN: "KV cache per token", KV_AT: f"KV cache at {CONTEXT:,} tokens"}
    for key, form in forms.items():
        before, after = record["before"].get(key), record["after"].get(key)
        if before:
            table.add_row(names.get(key, key), form(before), form(after), relative_change(before, after))
    return table


def relative_change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else ""


def nbytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    raise AssertionError


ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters", "parameters", lambda v: f"{v:,}"),
    ("checkpoint", "checkpoint_bytes", nbytes),
    ("KV cache per token", PER_TOKEN, nbytes),
    ("KV cache at {context:,} tokens", "kv_bytes", nbytes),
    ("perplexity", "perplexity", lambda v: f"{v:.2f}"),
    ("prefill tokens/s", "prefill_tokens_per_s", lambda v: f"{v:,.1f}"),
    ("decode tokens/s", "decode_tokens_per_s", lambda v: f"{v:,.1f}"),
)
