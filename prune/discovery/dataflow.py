"""The residual stream through one block: the path it takes, what is added to it, and what feeds each summand.

The stream is the shortest path, in operations, from the block's input to its output.  Every step of it
either merges a summand, carries the stream as it is, scales it by a constant of the block, or mixes it
(a norm, a hyper-connection).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dropformer.prune.architecture import within
from dropformer.prune.discovery.trace import Call, Trace

StepKind = Literal["merge", "carry", "scale", "mix"]


def _aten(names: str) -> set[str]:
    return {"aten::" + name for name in names.split()}


ADDS = _aten("add add_")
SCALES = _aten("mul mul_ div div_")
# What leaves every number as it is; a few of these change where it stands.
KEEPS_PLACE = _aten("dropout native_dropout view _unsafe_view reshape _to_copy clone contiguous alias detach")
CARRIES = KEEPS_PLACE | _aten("transpose permute unsqueeze squeeze expand select slice narrow roll constant_pad_nd")


PRODUCTS = _aten("mm addmm bmm baddbmm matmul linear einsum convolution")


@dataclass(frozen=True)
class Step:
    """One operation on the stream, from value `before` to value `after`; `other` is what a merge adds."""

    op: int
    kind: StepKind
    before: int
    after: int
    other: int = -1


@dataclass
class Term:
    """One summand: its value, the stream value it is added to, the sum, and the operations that feed it.

    `scaled`: it is multiplied on its way to the addition.  `reads`: the stream values it is made from.
    """

    value: int
    added_to: int
    result: int
    scaled: bool
    ops: set[int] = field(default_factory=set)
    reads: set[int] = field(default_factory=set)


class Flow:
    """A block's part of the trace, with its stream laid bare.

    `stream` maps each value on the path to its place; `segment` numbers its stretches between merges and
    mixes, within which only constants of the block touch it.  `ends` are those of the stream, by default what
    `stream_ends` finds; `beside` those of the block's other streams, whose values end a branch as its own do.
    Raises ValueError where there is no path.
    """

    def __init__(self, trace: Trace, call: Call, ends: Ends | None = None, beside: Sequence[Ends] = ()) -> None:
        self.trace, self.call = trace, call
        found: Any = ends or stream_ends(trace, call) or (None, -1, None, -1)
        self.in_key, self.x, self.out_key, self.y = found
        self.ops = {i: trace.ops[i] for i in range(call.first, call.last)}
        self.made = {value: i for i, op in self.ops.items() for value in op.outputs}
        self.users: dict[int, list[int]] = {}
        for i, op in self.ops.items():
            for value in op.inputs:
                self.users.setdefault(value, []).append(i)
        inside = (c for c in trace.calls if call.first <= c.first and c.last <= call.last)
        self.calls = [c for c in inside if within(c.path, call.path) and c is not call]
        self.reach = self._depends_on({self.x, *(other[1] for other in beside)})
        paths = [self.shortest_path(other[1], other[3]) for other in beside]
        self.beside = {other[1] for other in beside} | {after for path in paths for _, _, after in path}
        self.steps = self._steps(self.shortest_path(self.x, self.y))
        self.stream = {self.x: 0} | {step.after: place for place, step in enumerate(self.steps, 1)}
        self.segment = self._segments()
        self.terms = list(self._terms())
        for term in self.terms:
            term.ops, term.reads = self.feeding([term.value])
        self.kept = self._kept()

    def _depends_on(self, reach: set[int]) -> set[int]:
        for op in self.ops.values():
            if not reach.isdisjoint(op.inputs):
                reach.update(op.outputs)
        return reach

    def shortest_path(self, x: int, y: int) -> list[tuple[int, int, int]]:
        """(operation, value in, value out) from x to y with the fewest operations.  Raises ValueError without one."""
        best: dict[int, tuple[int, int, int]] = {x: (0, -1, x)}
        for i, op in self.ops.items():
            known = [v for v in op.inputs if v in best]
            if not known:
                continue
            nearest = min(known, key=lambda v: best[v][0])
            for out in op.outputs:
                if out not in best or best[nearest][0] + 1 < best[out][0]:
                    best[out] = (best[nearest][0] + 1, i, nearest)
        if y not in best:
            raise ValueError("its output does not depend on its input")
        path: list[tuple[int, int, int]] = []
        value = y
        while value != x:
            _, op_index, previous = best[value]
            path.append((op_index, previous, value))
            value = previous
        return path[::-1]

    def _steps(self, path: list[tuple[int, int, int]]) -> list[Step]:
        values = {self.x} | {after for _, _, after in path}
        return [self._step(values, *piece) for piece in path]

    def _step(self, stream: set[int], index: int, before: int, after: int) -> Step:
        op = self.ops[index]
        if not self.beside.isdisjoint(op.inputs):
            return Step(index, "mix", before, after)  # of one stream into another
        others = [v for v in op.inputs if v != before and v in self.reach and v not in stream]
        if op.name in ADDS and others and self.trace.values[others[0]].ndim >= 2:
            return Step(index, "merge", before, after, others[0])
        if op.name in CARRIES:
            return Step(index, "carry", before, after)
        if op.name in SCALES | ADDS and not others and before in op.inputs:
            return Step(index, "scale", before, after)
        return Step(index, "mix", before, after)

    def _segments(self) -> dict[int, int]:
        segment, number = {self.x: 0}, 0
        for step in self.steps:
            number += step.kind in ("merge", "mix")
            segment[step.after] = number
        return segment

    def _terms(self) -> Iterator[Term]:
        merges = [step for step in self.steps if step.kind == "merge"]
        scopes = {self.ops[step.op].scope for step in merges}
        for step in merges:
            for value, scaled in self._summands(step.other, scopes, False):
                yield Term(value, step.before, step.after, scaled)

    def _summands(self, value: int, scopes: set[str], scaled: bool) -> Iterator[tuple[int, bool]]:
        """Take apart a sum of branches (x + (A + M)), as far as it is written beside the merges themselves."""
        op = self.ops.get(self.made.get(value, -1))
        if op is None or op.scope not in scopes:
            yield value, scaled
            return
        sources = [v for v in op.inputs if v in self.reach]
        if op.name in ADDS and len(sources) == 2 and not any(v in self.stream for v in sources):
            for v in sources:
                yield from self._summands(v, scopes, scaled)
        elif op.name in CARRIES | SCALES | ADDS and len(sources) == 1 and sources[0] not in self.stream:
            yield from self._summands(sources[0], scopes, scaled or op.name not in CARRIES)
        else:
            yield value, scaled

    def feeding(self, values: Iterable[int]) -> tuple[set[int], set[int]]:
        """The operations that the values come from, back to the stream, and the stream values read there."""
        ops: set[int] = set()
        reads: set[int] = set()
        stack = list(values)
        while stack:
            value = stack.pop()
            if value in self.stream:
                reads.add(value)
            elif value in self.beside:
                continue
            elif (made := self.made.get(value)) is not None and made not in ops:
                ops.add(made)
                stack.extend(self.ops[made].inputs)
        return ops, reads

    def _kept(self) -> set[int]:
        """The stream's own operations, and whatever feeds its norms and mixes."""
        own = {step.op for step in self.steps}
        sides = [v for s in self.steps if s.kind in ("mix", "scale") for v in self.ops[s.op].inputs if v != s.before]
        return own | self.feeding(sides)[0]

    def read_by(self, term: Term) -> int:
        """The stream value that a term adds to: as the term reads it, where it does so before the next merge.

        A stretch with a norm or a mix of the stream between the two counts from where the term is added.
        """
        reads = sorted(term.reads, key=lambda v: self.stream[v])
        same = [v for v in reads if self.segment[v] == self.segment[term.added_to]]
        if same or not reads:
            return (same or [term.added_to])[-1]
        return reads[-1] if self._merges(self.stream[reads[-1]], self.stream[term.added_to]) else term.added_to

    def _merges(self, start: int, end: int) -> list[Step]:
        return [step for step in self.steps[start:end] if step.kind == "merge"]

    def parallel(self, terms: list[Term], others: list[Term]) -> bool:
        """Is any of the other summands merged between where these start and where the last of them is added?"""
        start, end = self.stream[self.read_by(terms[0])], self.stream[terms[-1].result]
        return any(start < self.stream[t.result] <= end for t in others)

    def mixed(self, start: int, end: int) -> bool:
        return any(step.kind == "mix" for step in self.steps[self.stream[start] : self.stream[end]])

    def sights(self, value: int) -> list[int]:
        """`value`, then values that hold the same numbers in the same order, nearest first."""
        seen = [value]
        for v in seen:
            for i in self.users.get(v, []):
                op = self.ops[i]
                seen += self._like(v, op.outputs if op.name in KEEPS_PLACE else (), seen)
            made = self.ops.get(self.made.get(v, -1))
            if made and made.name in KEEPS_PLACE:
                seen += self._like(v, made.inputs, seen)
        return seen

    def _like(self, value: int, others: Iterable[int], seen: Sequence[int]) -> list[int]:
        values = self.trace.values
        return [v for v in others if v not in seen and same_per_token(values[value].shape, values[v].shape)]

    def reaches(self, value: int, goals: set[int]) -> bool:
        """Does `value` become one of `goals` by operations, outside the module that made it, that keep zero zero?"""
        inside = [c for c in self.calls if value in c.outputs.values()]
        stack, seen = [value], {value}
        while stack:
            v = stack.pop()
            if v in goals:
                return True
            for i in self.users.get(v, []):
                op = self.ops[i]
                if op.name in CARRIES | SCALES | ADDS and not any(c.first <= i < c.last for c in inside):
                    new = [o for o in op.outputs if o not in seen and o not in self.stream]
                    seen.update(new)
                    stack.extend(new)
        return False

    @property
    def plain(self) -> bool:
        """True when without its summands the block returns its input as it came."""
        return all(step.kind in ("merge", "carry") for step in self.steps)

    @property
    def multiplied(self) -> bool:
        """True when the stream itself is multiplied by a matrix: hyper-connections, or a block without a shortcut."""
        return any(self.ops[step.op].name in PRODUCTS for step in self.steps)

    @property
    def scaled(self) -> bool:
        return any(step.kind == "scale" for step in self.steps)

    @property
    def inplace(self) -> bool:
        """True when the block writes into its stream or into what is added to it, or the trunk into what the block
        takes or gives."""
        scopes = {self.ops[step.op].scope for step in self.steps}
        return any(op.name.endswith("_") and op.scope in scopes for op in self.ops.values()) or self._written_outside()

    def _written_outside(self) -> bool:
        if not self.trace.in_place:
            return False  # most families: their traces are not gone through once a block
        ends = {self.x, self.y}
        for op in self.trace.ops:
            if op.name.endswith("_") and (not ends.isdisjoint(op.inputs[:1]) or not ends.isdisjoint(op.outputs)):
                return True
            if op.name in CARRIES and not ends.isdisjoint(op.inputs[:1]):
                ends.update(op.outputs)  # a view, as h[:, :4] is
        return False


def same_per_token(one: torch.Size, other: torch.Size) -> bool:
    """The same numbers per token, though tokens may be flattened into rows: [B, T, D] and [B * T, D]."""
    same = one.numel() == other.numel()
    return one == other or (same and bool(one) and bool(other) and one[-1] == other[-1])


Ends = tuple[int | str, int, int | str | None, int]  # input key, value, output key, value


def stream_ends(trace: Trace, call: Call) -> Ends | None:
    """(input key, value, output key, value) of the stream: the first input whose shape an output keeps."""
    for in_key, x in call.inputs.items():
        given = trace.values[x]
        if not given.floating or given.ndim < 2:
            continue
        for out_key, y in call.outputs.items():
            if trace.values[y].shape == given.shape and y != x and out_key not in call.passed:
                return in_key, x, out_key, y
    return None
