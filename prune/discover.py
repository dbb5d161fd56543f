"""Find a model's blocks and branches by watching a tiny forward pass.

No list of families: the residual stream of a block is the shortest path, in operations, from the
block's input to its output.  Each addition on that path merges a branch; the modules that feed one
branch alone are what a drop removes.  Sequential, parallel, sandwich-norm and post-norm blocks,
mixtures of experts and state-space mixers all fall out of this one rule.  Nothing is trusted before
`proof.prove` has dropped each branch and seen the stream unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dropformer.prune.architecture import Architecture, Block, Branch, BranchKind, Stack, Tap
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.inputs import sample_inputs
from dropformer.prune.trace import Call, Op, Trace, tracing

# A branch's kind is read off its modules' names; `proof` decides by experiment where no name fits.
CROSS_NAMES = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.I)
ATTENTION_NAMES = re.compile(
    r"attn|attention|mixer|mamba|ssm|conv|recurrent|temporal|rwkv|delta|retention|lru", re.I
)
MLP_NAMES = re.compile(r"mlp|ffn|feed_?forward|\bff\b|moe|expert|dense|intermediate|fc\d?|channel_mix", re.I)
# Operations that carry a branch to its addition without changing its direction.
CARRIERS = {"aten::" + name for name in ("dropout", "native_dropout", "view", "_unsafe_view", "reshape")} | {
    "aten::" + name
    for name in ("_to_copy", "clone", "transpose", "permute", "unsqueeze", "squeeze", "contiguous")
}
SCALES = {"aten::mul", "aten::div", "aten::mul_", "aten::div_"}
ADDS = {"aten::add", "aten::add_"}


def discover(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Architecture:
    """The stacks, blocks and branches of `model`, read off one traced forward pass.

    Works on meta tensors too.  `inputs` are keyword arguments of the model's forward; without them a
    tiny batch is made from the config.  Raises ArchitectureError with the block and the reason.
    """
    training = model.training
    model.eval()
    try:
        with tracing(model) as trace:
            model(**(sample_inputs(model) if inputs is None else inputs))
    finally:
        model.train(training)
    names = _stack_names(paths := _find_stacks(model, trace))
    return Architecture(
        tuple(_read_stack(trace, path, name, model) for path, name in zip(paths, names, strict=True))
    )


def _find_stacks(model: nn.Module, trace: Trace) -> list[str]:
    """Paths of the outermost ModuleLists whose every called child maps a tensor to one of its shape."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(
            path.startswith(f + ".") for f in found
        ):
            continue
        calls = [call for i, _ in enumerate(module) for call in trace.calls_of(f"{path}.{i}")]
        if calls and all(next(module[_index(c)].children(), None) is not None for c in calls):
            if all(_stream_ends(trace, call) for call in calls):
                found.append(path)
    if not found:
        raise ArchitectureError(
            f"{type(model).__name__} has no stack of repeated blocks (a ModuleList whose members keep the shape "
            "of their input); describe its blocks with dropformer.describe"
        )
    return found


def _index(call: Call) -> int:
    return int(call.path.rpartition(".")[2])


def _stack_names(paths: list[str]) -> list[str]:
    """ "" for the only stack, or the only one that is not vision or audio; else the telling path part."""
    side = re.compile(r"vision|visual|image|audio|speech", re.I)
    main = [path for path in paths if not side.search(path)]
    if len(main) == 1:
        return ["" if path in main else _part(path, paths) for path in paths]
    return ["" if len(paths) == 1 else _part(path, paths) for path in paths]


def _part(path: str, paths: list[str]) -> str:
    for word in ("encoder", "decoder", "vision", "audio"):
        mine = [p for p in paths if word in p]
        if mine == [path]:
            return word
    return path.replace(".", "_")


def _read_stack(trace: Trace, path: str, name: str, model: nn.Module) -> Stack:
    length = len(model.get_submodule(path))  # type: ignore[arg-type]
    blocks = []
    for index in range(length):
        calls = trace.calls_of(f"{path}.{index}")
        if len(calls) != 1:
            said = "was not called" if not calls else f"is called {len(calls)} times: its weights are shared"
            raise ArchitectureError(
                f"block {index} of {path} {said}; layers that share weights cannot be dropped alone"
            )
        blocks.append(_BlockReader(trace, calls[0], index).read())
    return Stack(name, path, tuple(blocks))


def _stream_ends(trace: Trace, call: Call) -> tuple[int | str, int, int | str | None, int] | None:
    """(input key, value, output key, value) of the stream: the first input whose shape an output keeps."""
    for in_key, x in call.inputs.items():
        tensor = trace.tensors[x]
        if not tensor.is_floating_point() or tensor.ndim < 2:
            continue
        for out_key, y in call.outputs.items():
            if trace.tensors[y].shape == tensor.shape and y != x:
                return in_key, x, out_key, y
    return None


@dataclass
class _Term:
    """One summand of the stream: its value, the stream value it is added to, and what fed it."""

    value: int
    added_to: int
    result: int
    alone: bool  # the only summand of its addition
    scaled: bool
    ops: set[int] = field(default_factory=set)
    reads: set[int] = field(default_factory=set)
    modules: list[str] = field(default_factory=list)
    kind: BranchKind = "attn"


class _BlockReader:
    """Reads one block's part of the trace: path, summands, who owns which module, taps."""

    def __init__(self, trace: Trace, call: Call, index: int) -> None:
        self.trace, self.call, self.index = trace, call, index
        self.ops = {i: trace.ops[i] for i in range(call.first, call.last)}
        self.made = {value: i for i, op in self.ops.items() for value in op.outputs}
        inside = (c for c in trace.calls if c.first >= call.first and c.last <= call.last)
        self.calls = [c for c in inside if c.path.startswith(call.path + ".")]

    def read(self) -> Block:
        ends = _stream_ends(self.trace, self.call)
        assert ends is not None
        in_key, x, out_key, y = ends
        self.reach = self._depends_on(x)
        path = self._shortest_path(x, y)
        self.stream = {x} | {out for _, _, out in path}
        terms = list(self._terms(path))
        if not terms:
            raise self._refuse("nothing is added to its residual stream")
        for term in terms:
            self._slice(term)
        self._assign_modules(terms, path)
        branches = [self._branch(kind, terms) for kind in ("attn", "cross", "mlp")]
        return Block(
            self.index,
            self.call.path,
            Tap(self.call.path, "input", in_key),
            Tap(self.call.path, "output", out_key),
            tuple(branch for branch in branches if branch),
            any((len(term.reads) == 1 and term.added_to not in term.reads) or not term.alone for term in terms),
        )

    def _refuse(self, reason: str) -> ArchitectureError:
        return ArchitectureError(f"block {self.index} ({self.call.path}) cannot be pruned: {reason}")

    def _depends_on(self, x: int) -> set[int]:
        reach = {x}
        for op in self.ops.values():
            if reach.intersection(op.inputs):
                reach.update(op.outputs)
        return reach

    def _shortest_path(self, x: int, y: int) -> list[tuple[Op, int, int]]:
        """The path from x to y with the fewest operations, as (operation, value in, value out)."""
        best: dict[int, tuple[int, Op | None, int]] = {x: (0, None, x)}
        for op in self.ops.values():
            known = [v for v in op.inputs if v in best]
            if not known:
                continue
            nearest = min(known, key=lambda v: best[v][0])
            for out in op.outputs:
                if out not in best or best[nearest][0] + 1 < best[out][0]:
                    best[out] = (best[nearest][0] + 1, op, nearest)
        if y not in best:
            raise self._refuse("its output does not depend on its input")
        path: list[tuple[Op, int, int]] = []
        value = y
        while value != x:
            _, op, previous = best[value]
            assert op is not None
            path.append((op, previous, value))
            value = previous
        return path[::-1]

    def _terms(self, path: list[tuple[Op, int, int]]) -> Iterator[_Term]:
        merges = [(op, a, out) for op, a, out in path if op.name in ADDS and len(op.inputs) >= 2]
        scopes = {op.scope for op, _, _ in merges}
        for op, added_to, result in merges:
            other = next(v for v in op.inputs if v != added_to)
            if other not in self.reach or self.trace.tensors[other].ndim < 2:
                continue  # a bias or a position, not a branch
            found = list(self._summands(other, scopes, False))
            for value, scaled in found:
                yield _Term(value, added_to, result, len(found) == 1, scaled)

    def _summands(self, value: int, scopes: set[str], scaled: bool) -> Iterator[tuple[int, bool]]:
        op = self.ops.get(self.made.get(value, -1))
        if op is None or op.scope not in scopes:
            yield value, scaled
            return
        streams = [v for v in op.inputs if v in self.reach]
        if op.name in ADDS and len(streams) == 2:
            for v in streams:
                yield from self._summands(v, scopes, scaled)
        elif len(streams) == 1 and op.name in CARRIERS | SCALES | ADDS:
            yield from self._summands(streams[0], scopes, scaled or op.name in SCALES)
        else:
            yield value, scaled

    def _slice(self, term: _Term) -> None:
        """Every operation that feeds the term, back to the stream values it reads."""
        stack = [term.value]
        while stack:
            value = stack.pop()
            if value in self.stream:
                term.reads.add(value)
            elif (made := self.made.get(value)) is not None and made not in term.ops:
                term.ops.add(made)
                stack.extend(v for v in self.ops[made].inputs)

    def _assign_modules(self, terms: list[_Term], path: list[tuple[Op, int, int]]) -> None:
        """Give each term its kind and the outermost modules that feed it alone.

        Terms of one kind share their modules (a mixture's routed and shared experts).
        """
        on_path = {self.made[out] for _, _, out in path}
        for term in terms:
            others = set().union(*(t.ops for t in terms if t is not term)) | on_path
            term.modules = list(self._owned(self.call.path, term.ops - others, others))
            term.kind = self._kind(term)
        for kind in {term.kind for term in terms}:
            mine = [t for t in terms if t.kind == kind]
            ops = set().union(*(t.ops for t in mine))
            others = set().union(*(t.ops for t in terms if t.kind != kind)) | on_path
            for term in mine:
                term.modules = list(self._owned(self.call.path, ops, others))

    def _owned(self, parent: str, mine: set[int], others: set[int]) -> Iterator[str]:
        depth = parent.count(".") + 1
        children = dict.fromkeys(
            ".".join(c.path.split(".")[: depth + 1]) for c in self.calls if c.path.startswith(parent + ".")
        )
        for child in children:
            ops = {i for i, op in self.ops.items() if op.scope == child or op.scope.startswith(child + ".")}
            if not ops & mine:
                continue
            called = any(c.path == child for c in self.calls)
            if called and not ops & others:
                yield child
            else:
                yield from self._owned(child, mine, others)

    def _kind(self, term: _Term) -> BranchKind:
        names = " ".join(path.removeprefix(self.call.path) for path in term.modules)
        classes = {self.ops[i].scope.removeprefix(self.call.path) for i in term.ops}
        for text in (names, " ".join(sorted(classes))):
            text = re.sub(
                r"(pre|post|input)_?(attention|attn|mlp|feedforward|self_attn)?_?(layer)?_?norm\w*", " ", text
            )
            if CROSS_NAMES.search(text):
                return "cross"
            if ATTENTION_NAMES.search(text):
                return "attn"
            if MLP_NAMES.search(text):
                return "mlp"
        mixing = {"aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_softmax", "aten::convolution"}
        return "attn" if any(self.ops[i].name in mixing for i in term.ops) else "mlp"

    def _branch(self, kind: BranchKind, terms: list[_Term]) -> Branch | None:
        mine = [term for term in terms if term.kind == kind]
        if not mine:
            return None
        modules = self._forms(mine)
        self._check_nobody_else_reads(kind, modules)
        first, last = mine[0], mine[-1]
        reads = first.reads or {first.added_to}
        parallel = len(mine) > 1 or not first.alone or first.added_to not in reads
        if kind != "mlp" and len(mine) > 1 and first.result != last.result and not parallel:
            raise self._refuse(f"it has {len(mine)} {kind} branches")
        alone = {t.result for t in mine} == {last.result} and all(
            t.result != last.result or t in mine for t in terms
        )
        before = self._tap(max(reads) if len(reads) == 1 else first.added_to)
        if before is None:
            raise self._refuse(f"no module sees the residual stream before its {kind} branch")
        after = self._tap(last.result) if alone and last.added_to in reads else None
        if after:
            return Branch(kind, modules, before, after)
        taps = [self._tap(term.value) for term in mine]
        if any(tap is None for tap in taps) or any(term.scaled for term in mine):
            raise self._refuse(f"no module sees the residual stream after its {kind} branch")
        return Branch(kind, modules, before, None, tuple(tap for tap in taps if tap))

    def _forms(self, terms: list[_Term]) -> dict[str, Any]:
        """What each of the branch's modules returns once dropped: its input, or zeros for the last."""
        forms: dict[str, Any] = {}
        needed = {v for t in terms for i in t.ops for v in self.ops[i].inputs} | {t.value for t in terms}
        for path in terms[0].modules:
            call = next(c for c in self.calls if c.path == path)
            key = next((k for k, v in call.outputs.items() if v in needed), None)
            last = any(self._carried(v, {t.value for t in terms}) for v in call.outputs.values())
            word = "zeros" if last else "input"
            if isinstance(key, str):
                raise self._refuse(f"{path} returns a {key} field, expected a tensor or a tuple")
            form = (
                word
                if call.form == "tensor"
                else [word if i == key else None for i in range(len(call.form or []))]
            )
            forms[path.removeprefix(self.call.path + ".")] = form
        if not any(form == "zeros" or "zeros" in form for form in forms.values()):
            raise self._refuse(f"the {terms[0].kind} branch shares its last module with another")
        return forms

    def _carried(self, value: int, goals: set[int]) -> bool:
        """Does `value` reach a goal through operations of the block itself that keep zeros zero?"""
        if value in goals:
            return True
        for i, op in self.ops.items():
            if value in op.inputs and op.name in CARRIERS | SCALES | ADDS and op.outputs:
                inside = any(
                    op.scope.startswith(c.path) and c.first <= i < c.last
                    for c in self.calls
                    if value in c.outputs.values()
                )
                if not inside and op.outputs[0] != value and self._carried(op.outputs[0], goals):
                    return True
        return False

    def _check_nobody_else_reads(self, kind: str, modules: dict[str, Any]) -> None:
        """Refuse a branch that makes something which later blocks read (T5's position bias, shared KV)."""
        prefixes = tuple(f"{self.call.path}.{name}" for name in modules)
        made = {v for op in self.ops.values() if op.scope.startswith(prefixes) for v in op.outputs}
        made -= {v for call in self.calls for v in call.inputs.values()} & self.stream
        for op in self.trace.ops[self.call.last :]:
            if made.intersection(op.inputs):
                raise self._refuse(
                    f"its {kind} branch makes a tensor that {op.scope or 'a later block'} reads"
                )

    def _tap(self, value: int) -> Tap | None:
        if value == self.call.inputs.get(
            key := next((k for k, v in self.call.inputs.items() if v == value), -1)
        ):
            return Tap(self.call.path, "input", key)
        for call in self.calls:
            for key, v in call.inputs.items():
                if v == value:
                    return Tap(call.path, "input", key)
            for out, v in call.outputs.items():
                if v == value:
                    return Tap(call.path, "output", out)
        for out, v in self.call.outputs.items():
            if v == value:
                return Tap(self.call.path, "output", out)
        return None
