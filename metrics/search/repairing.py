"""The repairs of a drop, one after the other, each kept only if it lowers perplexity on text of another domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from dropformer.metrics.blockwise.divergence import DenseReference
from dropformer.metrics.blockwise.gate import Gate, Gating
from dropformer.metrics.blockwise.layer_metrics import MetricContext
from dropformer.metrics.blockwise.variant import Changes, Variant, variant
from dropformer.metrics.blockwise.work import Work
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.repair.base import Repair, RepairContext, reasons
from dropformer.metrics.repair.gaps import gaps
from dropformer.metrics.repair.registry import REPAIRS
from dropformer.metrics.repair.slots import BranchOutput
from dropformer.metrics.search.calibration import gate_batches
from dropformer.metrics.search.strategy import Strategy
from dropformer.progress import Tell
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.parts import evaluating


class Repaired(Protocol):
    """The part of `Improver` that repairs use."""

    model: nn.Module
    quality: Strategy
    architecture: Architecture
    outputs: dict[Layer, BranchOutput]
    bench: MetricContext
    work: Work

    @property
    def tell(self) -> Tell: ...

    def maps(self, layers: Sequence[Layer]) -> Changes: ...

    def context(self, dropped: Sequence[Layer] = (), before: Changes | None = None) -> RepairContext: ...


def repaired(
    improver: Repaired, dropped: Sequence[Layer], other: Windows | None = None, maps: Sequence[Layer] = ()
) -> tuple[Repair, Variant]:
    """Repair the improver's model without `dropped` by each method of its strategy, gated on `other` text.

    `maps`: dropped layers that become linear maps, ungated.  Without `other` nothing is gated.  Also returns the
    repaired model as a variant of the dense one.  Layers that could not be repaired are reported with the reason,
    and recorded in the repair.
    """
    changes, gates, missed = improver.maps(maps), list[Gate](), list[tuple[str, str]]()
    gate = _gating(improver, other, dropped) if other is not None and improver.quality.repair else None
    with evaluating(improver.model):
        for name in _repairs(improver, improver.context(dropped, changes)):
            base = changes.without(_norms(improver) - _mapped(improver, changes)) if REPAIRS[name].afresh else changes
            new: Changes = REPAIRS[name].method()(improver.context(dropped, base))
            for line in reasons(new.unrepaired):
                improver.tell(f"{name}: {line}")
            missed += [(f"{name}: {layer}", why) for layer, why in new.unrepaired]
            if new.empty:
                improver.tell(f"{name}: found nothing to change here")
                continue
            tried = base | new
            if gate is not None:
                gates.append(gate(name, changes, tried))
                improver.tell(str(gates[-1]))
            if gate is None or gates[-1].passed:
                changes = tried
                if REPAIRS[name].afresh:  # what closed forms could not repair is repaired
                    missed = [(layer, why) for layer, why in missed if layer.startswith(f"{name}: ")]
    repair = Repair(changes.tensors, changes.maps, tuple(gates), tuple(missed), improver.work.passes)
    return repair, variant(improver.model, improver.architecture, dropped, changes)


def _repairs(improver: Repaired, context: RepairContext) -> tuple[str, ...]:
    """The strategy's repairs of a drop, with a line where some take the place of others."""
    before = gaps(context.architecture, context.branches)
    found = improver.quality.behind(context.outputs[layer] for layer in before)
    if found != improver.quality.repair:
        where = ", ".join(str(layer) for layer in before if not context.outputs[layer].closed)
        improver.tell(f"no projection before a gap to refit ({where}), so blocks are distilled: {', '.join(found)}")
    return found


def _norms(improver: Repaired) -> set[str]:
    return {output.slot.path for output in improver.outputs.values() if output.slot and output.slot.kind == "norm"}


def _mapped(improver: Repaired, changes: Changes) -> set[str]:
    """Paths of modules whose parameters are a map's: in a sandwich, the norm behind the attention layer."""
    forms = changes.maps.items()
    return {f"{improver.architecture.block(layer).path}.{name}" for layer, inside in forms for name in inside}


def _gating(improver: Repaired, other: Windows, dropped: Sequence[Layer]) -> Gating:
    """The gate, on few windows, so that it is cheap beside the calibration."""
    inputs, scored = gate_batches(other, improver.bench.runner.tokens, input_device(improver.model))
    with evaluating(improver.model):
        runner = improver.bench.runner.like(inputs, improver.architecture)
        dense = DenseReference(runner, improver.quality.stride, scored)
    return Gating(dense, lambda changes: variant(improver.model, improver.architecture, dropped, changes))
