"""The module by which each branch writes into the residual stream (its slot), found in the dataflow.

The trace leads from a branch's output back, through views, constant factors and sums, to the module that computed it.
A linear module (o_proj, down_proj, a mixer's out_proj, a shared expert's) can compensate the gap after it in closed
form; a norm (sandwich and post-norm blocks) can by its weight per channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dropformer.prune.architecture import Architecture, Block, Branch, Layer, Tap
from dropformer.prune.discovery.dataflow import ADDS, KEEPS_PLACE, SCALES, Flow, Term, same_per_token
from dropformer.prune.discovery.replay import traceable
from dropformer.prune.discovery.trace import Call, Op, Trace, tracing
from dropformer.prune.samples.inputs import sample_inputs


@dataclass(frozen=True)
class OutputProjection:
    """The module whose output times `scale` is its branch's output, or a summand of it.

    `kind`: a linear module, or a norm with a weight per channel.  `reads`: the dense model's module with the same
    input, if not the one at `path`.
    """

    layer: Layer
    path: str
    reads: str | None = None
    scale: float = 1.0
    kind: Literal["linear", "norm"] = "linear"


@dataclass(frozen=True)
class BranchOutput:
    """A branch's output: the sum of tensors at taps, each times a number (no taps: a difference of streams).

    `slot` is the module to refit, None for the `reason`.
    """

    taps: tuple[tuple[Tap, float], ...]
    slot: OutputProjection | None
    reason: str = ""

    @property
    def closed(self) -> bool:
        """Whether a projection writes it, which a closed form can refit."""
        return self.slot is not None and self.slot.kind == "linear"


def branch_outputs(model: nn.Module, architecture: Architecture) -> dict[Layer, BranchOutput]:
    """The output of every branch, from one small traced forward pass, also on the meta device."""
    with traceable(model), tracing(model) as trace:
        model(**sample_inputs(model))
    found: dict[Layer, BranchOutput] = {}
    for stack in architecture.stacks:
        for block in stack.blocks:
            if not block.branches:
                continue
            reader = _Reader(model, trace, block)
            for branch in block.branches:
                layer = Layer(branch.kind, block.index, stack.name)
                found[layer] = reader.read(branch, layer)
    return found


def projections(outputs: Mapping[Layer, BranchOutput]) -> dict[Layer, OutputProjection]:
    """The slots of the branches that have one."""
    return {layer: output.slot for layer, output in outputs.items() if output.slot}


class _Reader:
    """Reads the outputs of one block's branches from its dataflow."""

    def __init__(self, model: nn.Module, trace: Trace, block: Block) -> None:
        self.model, self.block = model, block
        self.flow = Flow(trace, trace.calls_of(block.path)[0])
        self.by_output: dict[int, list[Call]] = {}
        for call in self.flow.calls:
            for value in call.outputs.values():
                self.by_output.setdefault(value, []).append(call)
        self.times = [call.path for call in self.flow.calls]

    def read(self, branch: Branch, layer: Layer) -> BranchOutput:
        terms = [term for term in self.flow.terms if self._owner(term) is branch]
        if not terms:
            return BranchOutput((), None, "what it adds to the residual stream is not told apart from other branches")
        factors = [self._factor(term) for term in terms]
        if None in factors:
            return BranchOutput((), None, "its output is multiplied by a parameter on its way to the stream")
        scaled = [(term.value, factor) for term, factor in zip(terms, factors, strict=True) if factor is not None]
        taps = [self._taps(value, factor) for value, factor in scaled]
        seen = tuple(part for parts in taps for part in parts) if all(taps) else ()
        slots = [slot for value, factor in scaled for slot in self._slots(value, layer, factor)]
        if branch.scaled:
            return BranchOutput(seen, None, "its block multiplies the residual stream itself")
        if self.flow.multiplied or not self._reaches_end(terms[-1]):
            return BranchOutput(seen, None, "a norm of the residual stream itself follows it in its block")
        if not slots:
            maker = self._makers(terms)
            why = f"its output comes from {maker}, not from a linear module or a norm; --repair distill trains it"
            return BranchOutput(seen, None, why)
        return BranchOutput(seen, max(slots, key=lambda slot: slot.kind == "linear"))

    def _owner(self, term: Term) -> Branch | None:
        """The branch whose modules ran most of a term's operations."""

        def inside(branch: Branch) -> int:
            places = [f"{self.block.path}.{name}" for name in branch.modules]
            scopes = [self.flow.ops[i].scope for i in term.ops]
            return sum(any(s == p or s.startswith(p + ".") for p in places) for s in scopes)

        best = max(self.block.branches, key=inside)
        return best if inside(best) else None

    def _factor(self, term: Term) -> float | None:
        """The constant factor of a term before it is added to the stream; None if it is no constant."""
        merges = {step.op for step in self.flow.steps if step.kind == "merge" and step.after == term.result}
        waiting, seen = [(term.value, 1.0)], {term.value}
        while waiting:
            value, factor = waiting.pop()
            for i in self.flow.users.get(value, []):
                op = self.flow.ops[i]
                if i in merges:
                    return None if op.numbers and set(op.numbers) != {1} else factor
                times = _multiplier(op) if op.name in SCALES else 1.0
                if op.name in KEEPS_PLACE | ADDS | SCALES and times is not None:
                    waiting += [(v, factor * times) for v in op.outputs if v not in seen]
                    seen.update(op.outputs)
        return None

    def _reaches_end(self, term: Term) -> bool:
        """Whether no norm or mix of the stream follows the sum in its block (in post-LN blocks one does)."""
        return not any(step.kind == "mix" for step in self.flow.steps[self.flow.stream[term.result] :])

    def _taps(self, value: int, scale: float) -> list[tuple[Tap, float]]:
        """Module outputs, with factors, that sum to a value; empty if there are none."""
        calls = [call for call in self.by_output.get(value, []) if self.times.count(call.path) == 1]
        if calls:
            call = min(calls, key=lambda call: call.path.count("."))
            key = next(key for key, made in call.outputs.items() if made == value)
            return [(Tap(call.path, "output", key), scale)]
        found = [self._taps(source, factor) for source, factor in self._sources(value, scale)]
        return [part for parts in found for part in parts] if found and all(found) else []

    def _slots(self, value: int, layer: Layer, scale: float) -> Iterator[OutputProjection]:
        """The linear modules and norms whose outputs, times a factor, are summands of a value."""
        for call in self.by_output.get(value, []):
            module = self.model.get_submodule(call.path)
            if self.times.count(call.path) != 1 or None not in call.outputs:
                continue
            if isinstance(module, (nn.Linear, Conv1D)) and _floating(module):
                yield OutputProjection(layer, call.path, None, scale)
                return
            if _is_norm(module, self.flow.trace.values[value].shape[-1]):
                yield OutputProjection(layer, call.path, None, scale, "norm")
                return
        for source, factor in self._sources(value, scale):
            yield from self._slots(source, layer, factor)

    def _sources(self, value: int, scale: float) -> list[tuple[int, float]]:
        """The tensors of which a value is a view, a constant multiple or a sum, with factors."""
        op = self.flow.ops.get(self.flow.made.get(value, -1))
        if op is None:
            return []
        from_stream = [v for v in op.inputs if v in self.flow.reach]
        shapes = [self.flow.trace.values[v].shape for v in (value, *from_stream)]
        if op.name in KEEPS_PLACE and len(from_stream) == 1 and same_per_token(*shapes):
            return [(from_stream[0], scale)]
        if op.name in ADDS and len(from_stream) == 2 and not op.numbers:
            return [(v, scale) for v in from_stream]
        times = _multiplier(op) if op.name in SCALES and len(from_stream) == 1 else None
        return [] if times is None else [(from_stream[0], scale * times)]

    def _makers(self, terms: list[Term]) -> str:
        """The class of the module that computes a branch's output."""
        op = self.flow.ops.get(self.flow.made.get(terms[-1].value, -1))
        scope = op.scope if op else self.block.path
        return type(self.model.get_submodule(scope)).__name__ if scope else "the block"


def _multiplier(op: Op) -> float | None:
    """The number by which an operation multiplies its only tensor, else None."""
    if len(op.inputs) != 1 or not op.numbers:
        return None
    return 1 / prod(op.numbers) if "div" in op.name else prod(op.numbers)


def _floating(module: nn.Module) -> bool:
    weight = module.weight
    return isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module has one weight per channel, and perhaps a bias."""
    own = dict(module.named_parameters())
    return "weight" in own and set(own) <= {"weight", "bias"} and all(p.shape == (width,) for p in own.values())
