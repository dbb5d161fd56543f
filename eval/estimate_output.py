"""An estimate as the command line reads and prints it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dropformer.prune.errors import PlanError
from dropformer.prune.plan import Selector

if TYPE_CHECKING:
    from dropformer.eval.estimate import Estimate

FIGURES = (
    ("parameters", "parameters", "{:,.0f}"),
    ("checkpoint, GiB", "checkpoint_bytes", "{:,.2f}"),
    ("KV cache, GiB", "kv_bytes", "{:,.2f}"),
    ("prefill, TFLOP", "prefill_flops", "{:,.2f}"),
    ("decode step, GFLOP", "decode_flops", "{:,.2f}"),
)
UNITS = {"checkpoint_bytes": 2**30, "kv_bytes": 2**30, "prefill_flops": 1e12, "decode_flops": 1e9}


def drops_of(selectors: Sequence[Selector]) -> dict[str, Any]:
    """A drop spec as an estimate takes it: kind -> count, or the set of blocks.  Raises PlanError."""
    drops: dict[str, Any] = {}
    for selector in selectors:
        if selector.kind == "joint" or selector.percent or selector.stack or selector.kind in drops:
            raise PlanError(f"an estimate takes attn:N, mlp:N, block:N or lists of blocks, each once, not `{selector}`")
        drops[selector.kind] = set(selector.indices) if selector.indices is not None else selector.count
    return drops


def estimate_rows(found: Estimate) -> list[tuple[str, str, str, str]]:
    """(label, dense, pruned, change) for the figures and the roofline times with fused attention."""
    rows = []
    for label, name, form in FIGURES:
        unit = UNITS.get(name, 1)
        before, after = getattr(found.dense, name) / unit, getattr(found.pruned, name) / unit
        rows.append((label, form.format(before), form.format(after), _change(before, after)))
    for part in ("prefill", "decode", "generation"):
        before, after = (getattr(side.times["fused"], part) for side in (found.dense, found.pruned))
        rows.append((f"{part}, s", f"{before:,.3f}", f"{after:,.3f}", _change(before, after)))
    rows.append(("devices needed", str(found.dense.devices), str(found.pruned.devices), ""))
    return rows


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else ""
