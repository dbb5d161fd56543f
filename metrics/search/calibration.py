"""Batches of calibration windows for searches and repairs: for fitting, validation or measuring candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropformer.metrics.calibration.batching import BUSY_GPU, some_rows
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.repair.ridge import Group, group_of

GATE_SHARE = 8  # a gate uses at most this fraction (1/8) of the calibration's tokens, but two windows at least


@dataclass(frozen=True)
class Batch:
    """Windows of one domain and group: model inputs, the tokens that count (None: all), the group of a fit."""

    inputs: dict[str, Tensor]
    scored: Tensor | None
    domain: int
    group: Group
    windows: int


def batches_of(data: Sequence[Windows], device: torch.device, alone: int = 0) -> list[Batch]:
    """Every window of every domain; on a GPU, those of one group share batches.

    The first `alone` windows, on which a search measures, have batches of their own: foreseen repairs are not fitted
    on them.
    """
    found = []
    alone = -(-alone // max(1, len(data)))
    for domain, windows in enumerate(data):
        size = 1 if device.type == "cpu" else max(1, BUSY_GPU // windows.ids.shape[1])
        groups: dict[Group, list[int]] = {}
        first, lengths = range(min(alone, len(windows))), windows.lengths()
        for n in range(len(first), len(windows)):
            groups.setdefault(group_of(domain, n), []).append(n)
        parts = [(group_of(domain, n), [n]) for n in first]
        ordered = {group: sorted(rows, key=lengths.__getitem__) for group, rows in groups.items()}
        parts += [(group, rows[i : i + size]) for group, rows in ordered.items() for i in range(0, len(rows), size)]
        for group, rows in sorted(parts, key=lambda part: part[1][0]):
            inputs, counts = windows.batch(rows)
            found.append(Batch(inputs, None if counts.all() else counts, domain, group, len(rows)))
    return found


def tokens_read(batches: Sequence[Batch]) -> str:
    """Computed and needed tokens of a pass over the batches, in words; "" if all windows have one length."""
    ids = [batch.inputs["input_ids"] for batch in batches if "input_ids" in batch.inputs]
    masks = [batch.inputs["attention_mask"] for batch in batches if "attention_mask" in batch.inputs]
    computed = sum(each.numel() for each in ids)
    needed = computed - sum(int((mask == 0).sum()) for mask in masks)
    if needed == computed and len({each.shape[1] for each in ids}) <= 1:
        return ""
    return f"tokens: {computed:,} computed for {needed:,} needed in a pass"


@dataclass(frozen=True)
class SearchSize:
    """Number and length of the windows that a search measures on."""

    windows: int
    length: int


def search_size(tokens: int, length: int, domains: int, evaluations: float, passes: float, most: int) -> SearchSize:
    """Windows for a search whose `evaluations`, each a pass over them, cost about `passes` passes over all `tokens`.

    At most `most` windows, at least one per domain, shortened if needed.
    Example: 32,768 tokens in windows of 512, 24 evaluations, 1.5 passes: 2,048 tokens, four windows.
    """
    budget = passes * tokens / max(evaluations, 1.0)
    count = min(most, max(min(domains, most), round(budget / length)))
    return SearchSize(count, min(length, max(64, int(budget / count))))


def shortened(batch: Batch, windows: int, length: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """The first windows of a batch cut to `length` tokens: inputs and scored positions."""
    inputs = some_rows(batch.inputs, slice(windows))
    inputs = {name: value[:, :length] if value.ndim == 2 else value for name, value in inputs.items()}
    scored = None if batch.scored is None else batch.scored[:windows, :length]
    short = scored is not None and not scored[:, 1:].any()
    return (batch.inputs, batch.scored) if short else (inputs, scored)


def gate_batches(
    other: Windows, tokens: int, device: torch.device
) -> tuple[list[dict[str, Tensor]], list[Tensor | None]]:
    """Inputs and scored positions for a gate, few beside a calibration of `tokens` tokens.

    Windows with unscored positions are not shortened.
    """
    length, most = other.ids.shape[1], tokens // GATE_SHARE
    count = min(len(other), max(2, most // length))
    size = 1 if device.type == "cpu" else max(1, BUSY_GPU // length)
    whole = [other.batch(range(i, min(i + size, count))) for i in range(0, count, size)]
    short = min(length, max(64, most // count)) if other.scored.all() else length
    inputs = [{name: tensor[:, :short] for name, tensor in batch.items()} for batch, _ in whole]
    scored = [counts[:, :short] for _, counts in whole]
    return inputs, [None if counts.all() else counts for counts in scored]
