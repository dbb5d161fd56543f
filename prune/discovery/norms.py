"""One rule for norms: the norm after the sum of the residual stream and a branch stays when the branch is dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dropformer.prune.architecture import norm_of, within
from dropformer.prune.discovery.dataflow import Flow
from dropformer.prune.discovery.trace import Call


def norm_after_sum(flow: Flow, call: Call) -> str:
    """The child by which a module norms the sum of the stream and its branch; "" for a module that norms no stream.

    XLNet's attention is such a module: it returns layer_norm(x + A(x)).  Raises ValueError where the norm is no
    child's work alone, so that it could not stay.
    """
    inside = [step for step in flow.steps if call.first <= step.op < call.last]
    if all(step.kind != "mix" for step in inside):
        return ""
    for child in flow.calls:
        parent, _, name = child.path.rpartition(".")
        if parent != call.path or not call.first <= child.first <= child.last <= call.last:
            continue
        rest = [step for step in inside if not child.first <= step.op < child.last]
        sums = [step.op for step in rest if step.kind == "merge"]
        if sums and max(sums) < child.first and all(step.kind in ("merge", "carry") for step in rest):
            return name
    raise ValueError("a norm of the residual stream would be dropped with it")


def replaced_paths(block: str, modules: Mapping[str, Any]) -> Iterator[str]:
    """Paths of the replaced modules that keep no norm."""
    return (f"{block}.{name}" for name, form in modules.items() if not norm_of(form))


def is_inside(path: str, block: str, modules: Mapping[str, Any]) -> bool:
    """Is a module inside a replaced one, and no norm that stays?"""
    return any(
        path.startswith(f"{block}.{name}.") and not (norm_of(form) and within(path, f"{block}.{name}.{norm_of(form)}"))
        for name, form in modules.items()
    )
