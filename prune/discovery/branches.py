"""From a block's dataflow to its branches: their kind, the modules of each, where the stream is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dropformer.prune.architecture import BranchKind, Tap, has_zeros, within
from dropformer.prune.discovery.dataflow import Flow, Term, same_per_token
from dropformer.prune.discovery.norms import is_inside, norm_after_sum, replaced_paths
from dropformer.prune.discovery.trace import Call

CACHES = {"past_key_values", "past_key_value", "cache_params", "cache"}

Forms = dict[str, Any]  # module path within the block -> what it returns once dropped (`skipped_modules.Skipped`)


@dataclass(frozen=True)
class BranchRemoval:
    """One way to drop a branch: the modules to replace, and where the stream is read before and after."""

    modules: Forms
    before: Tap
    after: Tap | None
    delta: tuple[Tap, ...]


@dataclass(frozen=True)
class BranchCandidate:
    """A branch as the trace shows it, before anything was tried: ways to drop it, best first, or why not."""

    kind: BranchKind
    cuts: tuple[BranchRemoval, ...]
    parallel: bool
    reason: str = ""


class BranchReader:
    """Reads the branches of one block off its flow."""

    def __init__(self, flow: Flow, kind_of: Callable[[str, Term], BranchKind]) -> None:
        self.flow, self.path, self.kind_of = flow, flow.call.path, kind_of
        self.by_scope: dict[str, set[int]] = {}
        for i, op in flow.ops.items():
            self.by_scope.setdefault(op.scope, set()).add(i)
        self.times = Counter(call.path for call in [flow.call, *flow.calls])
        self.children: dict[str, dict[str, None]] = {}
        for call in flow.calls:
            parts = call.path.removeprefix(self.path + ".").split(".")
            for depth in range(len(parts)):
                parent = ".".join([self.path, *parts[:depth]])
                self.children.setdefault(parent, {})[".".join([self.path, *parts[: depth + 1]])] = None

    def read(self) -> list[BranchCandidate]:
        groups: dict[BranchKind, list[Term]] = {}
        terms = self.flow.terms
        for term in terms:
            others = self.flow.kept.union(*(t.ops for t in terms if t is not term))
            alone = self._owned(self.path, term.ops - others, others, set())
            names = " ".join(path.removeprefix(self.path + ".") for path, _ in alone)
            groups.setdefault(self.kind_of(names or self._scopes(term), term), []).append(term)
        order: tuple[BranchKind, ...] = ("attn", "cross", "mlp")
        return [self._draft(kind, groups[kind]) for kind in order if kind in groups]

    def _scopes(self, term: Term) -> str:
        """The modules that did any of a term's work, where none did only that."""
        return " ".join(sorted({self.flow.ops[i].scope.removeprefix(self.path) for i in term.ops}))

    def _draft(self, kind: BranchKind, mine: list[Term]) -> BranchCandidate:
        others = [t for t in self.flow.terms if t not in mine]
        parallel = self.flow.parallel(mine, others)
        cuts: list[BranchRemoval] = []
        reasons: list[str] = []
        for modules, reason in self._alternatives(mine, others):
            try:
                if reason or (reason := self._read_later(modules)):
                    raise ValueError(reason)
                cut = self._cut(modules, mine, parallel)
                cuts += [cut] if cut not in cuts else []
            except ValueError as error:
                reasons.append(str(error))
        return BranchCandidate(kind, tuple(cuts), parallel, "" if cuts else reasons[0])

    def _alternatives(self, mine: list[Term], others: list[Term]) -> Iterator[tuple[Forms, str]]:
        """Sets of modules whose replacement removes these terms, or why there is none.

        Best are the outermost modules, also such that add to the stream themselves; then only those
        that add nothing themselves; then only what produces the summands, so that a norm stays behind;
        last a module that norms the sum itself, and keeps that norm.
        """
        ops: set[int] = set().union(*(t.ops for t in mine))
        foreign = self.flow.kept.union(*(t.ops for t in others))
        results = {t.result for t in mine} - {t.result for t in others}
        merges = {s.op for s in self.flow.steps if s.kind == "carry" or (s.kind == "merge" and s.after in results)}
        for allowed in (merges, set(), merges | self.flow.kept):
            try:
                forms = self._forms(list(self._owned(self.path, ops - foreign, foreign, allowed)), mine)
            except ValueError as error:
                yield {}, str(error)
                continue
            yield forms, ""
            if not allowed and (last := {name: form for name, form in forms.items() if has_zeros(form)}):
                yield last, ""

    def _cut(self, modules: Forms, mine: list[Term], parallel: bool) -> BranchRemoval:
        """Where the stream is read around a branch whose `modules` go.  Raises ValueError where it is not seen."""
        flow = self.flow
        if not parallel and flow.mixed(flow.read_by(mine[0]), mine[-1].added_to):
            raise ValueError("it is several branches with a norm of the stream between them")
        before = self._tap(flow.read_by(mine[0]), modules)
        if before is None:
            raise ValueError("no module sees the residual stream before it")
        after = None if parallel else self._tap(self._leaving(mine[-1].result, modules), modules)
        if after:
            return BranchRemoval(modules, before, after, ())
        taps = [self._tap(term.value, modules) for term in mine]
        if not all(taps) or any(term.scaled for term in mine):
            raise ValueError("no module sees the residual stream after it")
        return BranchRemoval(modules, before, None, tuple(t for t in taps if t))

    def _leaving(self, value: int, modules: Forms) -> int:
        """`value`, or the stream where it leaves the replaced module that made it."""
        removed = set(replaced_paths(self.path, modules))
        for call in self.flow.calls:
            if call.path in removed and call.first <= self.flow.made[value] < call.last:
                return next((v for v in call.outputs.values() if v in self.flow.stream), value)
        return value

    def _owned(self, parent: str, mine: set[int], foreign: set[int], stream: set[int]) -> Iterator[tuple[str, bool]]:
        """The outermost modules that do only the branch's work; True where they also pass the stream on."""
        for child in self.children.get(parent, {}):
            ops = set().union(*(found for scope, found in self.by_scope.items() if within(scope, child)))
            if not ops & mine:
                continue
            calls = self._calls(child)
            strange = ops & foreign
            if calls and not strange:
                yield child, False
            elif len(calls) == 1 and strange <= stream and self._passes(calls[0]):
                yield child, True
            else:
                yield from self._owned(child, mine, foreign, stream)

    def _calls(self, path: str) -> list[Call]:
        return [call for call in self.flow.calls if call.path == path]

    def _passes(self, call: Call) -> tuple[int | str, int | str | None] | None:
        """The input that holds the stream and the output that holds it again, for a module on its path."""
        stream = self.flow.stream
        given = {key: stream[v] for key, v in call.inputs.items() if v in stream}
        back = {key: stream[v] for key, v in call.outputs.items() if v in stream}
        steps = [place for place, s in enumerate(self.flow.steps, 1) if call.first <= s.op < call.last]
        if not given or not back or not steps:
            return None
        source = next((key for key, place in given.items() if place == steps[0] - 1), None)
        target = next((key for key, place in back.items() if place == steps[-1]), "")
        return None if source is None or target == "" else (source, target)

    def _forms(self, modules: list[tuple[str, bool]], terms: list[Term]) -> Forms:
        """The output form of each module once it is dropped.  Raises ValueError where there is none.

        Example, Llama's attention branch x + self_attn(input_layernorm(x)): the norm only feeds the branch, so it
        returns its "input"; self_attn returns (summand, weights), so ["zeros", None].  With both the sum is x.
        """
        if not modules:
            raise ValueError("no module does its work alone")
        forms: Forms = {}
        silent: set[int] = set()
        for path, passes in modules:
            calls = self._calls(path)
            found = [self._form(call, passes, terms) for call in calls]
            if any(form != found[0] for form in found):
                raise ValueError(f"{path} is called twice, in two ways")
            forms[path.removeprefix(self.path + ".")] = found[0]
            for call in calls:
                silent.update(
                    n
                    for n, term in enumerate(terms)
                    if (passes and call.first <= self.flow.made[term.result] < call.last)
                    or any(self.flow.reaches(v, {term.value}) for v in call.outputs.values())
                )
        if len(silent) < len(terms):
            raise ValueError("it shares its last module with another branch, or has none")
        return forms

    def _form(self, call: Call, passes: bool, terms: list[Term]) -> Any:
        goals = {t.value for t in terms}
        outside = {i for t in terms for i in t.ops if not call.first <= i < call.last}
        needed = goals.union(*(self.flow.ops[i].inputs for i in outside))
        on_path = self._passes(call) if passes else None

        def member(key: int | str | None) -> str | None:
            value = call.outputs.get(key)
            if on_path and key == on_path[1]:
                return f"input:{on_path[0]}"
            if key in call.passed:
                return f"input:{call.passed[key]}"
            if key in call.nested:
                if call.state is None:
                    raise ValueError(f"{call.path} makes a state of its own")
                return f"input:{call.state}"
            if value is None or value not in needed:
                return None
            return self._word(call, value, "zeros" if self.flow.reaches(value, goals) else "input")

        form = form_of(call, {key: member(key) for key in call.keys})
        norm = norm_after_sum(self.flow, call) if passes else ""
        return {"norm": norm, "of": form} if norm else form

    def _word(self, call: Call, value: int, word: str) -> str:
        """ "zeros" or "input", qualified where the output is not shaped like the module's hidden states."""
        shape = self.flow.trace.values[value].shape
        shapes: dict[int | str, Any] = {key: self.flow.trace.values[v].shape for key, v in call.inputs.items()}
        hidden = "hidden_states" if "hidden_states" in shapes else next(iter(shapes), None)
        if hidden is not None and same_per_token(shapes[hidden], shape):
            return word
        like = next((key for key, s in shapes.items() if same_per_token(s, shape)), None)
        if like is not None:
            return f"{word}:{like}"
        if hidden is not None and shapes[hidden][:-1] == shape[:-1]:
            return f"zeros/{shape[-1]}"
        raise ValueError(f"{call.path} returns a tensor of another shape than its inputs")

    def _read_later(self, modules: Mapping[str, Any]) -> str:
        """Who reads a tensor that the branch makes for others: T5's position bias, shared keys and values."""
        paths = [f"{self.path}.{name}" for name in modules]
        made = {v for op in self.flow.ops.values() if any(within(op.scope, p) for p in paths) for v in op.outputs}
        made -= self.flow.stream.keys()
        trace = self.flow.trace
        later = [i for v in made if (i := trace.last_reader.get(v, -1)) >= self.flow.call.last]
        return f"it makes a tensor that {trace.ops[min(later)].scope or 'the model'} reads" if later else ""

    def stateful(self, modules: Mapping[str, Any]) -> bool:
        """Is any of these modules handed the cache?"""
        paths = [f"{self.path}.{name}" for name in modules]
        return any(c.keywords & CACHES and any(within(c.path, p) for p in paths) for c in self.flow.calls)

    def _tap(self, value: int, modules: Forms) -> Tap | None:
        """Where a hook sees this value: at the outermost module, outside of those that are removed."""
        found: list[tuple[int, int, Tap]] = []
        for v in self.flow.sights(value):
            for call in [self.flow.call, *self.flow.calls]:
                if is_inside(call.path, self.path, modules) or self.times[call.path] > 1:
                    continue
                depth = call.path.count(".")
                found += [(depth, 0, Tap(call.path, "input", k)) for k, given in call.inputs.items() if given == v]
                found += [(depth, 1, Tap(call.path, "output", k)) for k, made in call.outputs.items() if made == v]
            if found:
                return self._in_shape(min(found, key=lambda item: item[:2])[2], v)
        return None

    def _in_shape(self, tap: Tap, value: int) -> Tap:
        values, flow = self.flow.trace.values, self.flow
        if values[value].shape == values[flow.x].shape:
            return tap
        return replace(tap, like=Tap(self.path, "input", flow.in_key))


def form_of(call: Call, members: Mapping[int | str | None, str | None]) -> Any:
    """The output form of a module from those of its members.  Raises ValueError where its output holds no tensors."""
    if call.shape == "tensor":
        return members[None]
    if call.shape == "tuple":
        return list(members.values())
    if call.shape in ("list", "fields"):
        return {call.shape: list(members.values()) if call.shape == "list" else members}
    raise ValueError(f"{call.path} returns neither a tensor nor a tuple of tensors")
