"""Find a model's blocks and branches by watching a tiny forward pass.

No list of families: the residual stream of a block is the shortest path, in operations, from the
block's input to its output.  Each addition on that path merges a branch; the modules that feed one
branch alone are what a drop removes.  Sequential, parallel, sandwich-norm and post-norm blocks,
mixtures of experts and state-space mixers all fall out of this one rule.  Nothing is trusted before
`proof.prove` has dropped each branch and seen the stream unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from dropformer.prune.architecture import BRANCH_KINDS, Architecture, Block, Branch, BranchKind, Stack, Tap
from dropformer.prune.discovery.branches import BranchCandidate, BranchReader, BranchRemoval, form_of
from dropformer.prune.discovery.dataflow import Flow, Term, stream_ends
from dropformer.prune.discovery.kind_names import kind_by_name
from dropformer.prune.discovery.positions import fixed_blocks
from dropformer.prune.discovery.replay import Replay, traceable
from dropformer.prune.discovery.stacks import block_paths, find_stacks, stack_names
from dropformer.prune.discovery.streams import continues, hand_on_missing, hand_on_states, reversible_flows
from dropformer.prune.discovery.trace import Call, Trace, tracing
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.samples.inputs import sample_inputs


def _own_dtype(model: Any) -> str:
    """Advice for quantized weights that are run in another dtype than the checkpoint's."""
    stored = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}  # dequantized on loading
    stored = stored or len(dtypes) > 1
    return "; quantized weights compute in the checkpoint's own dtype: --dtype auto" if stored else ""


def discover(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Architecture:
    """The stacks, blocks and branches of `model`, read off one traced forward pass.

    Works on meta tensors too.  `inputs` are keyword arguments of the model's forward; without them a
    tiny batch is made from the config.  A branch that cannot be dropped is in its block's `kept` with
    the reason.  Raises ArchitectureError where nothing can be dropped at all.
    """
    return _discover(model, inputs, None, {})


def describe(
    model: nn.Module, blocks: str, inputs: Mapping[str, Tensor] | None = None, **branches: str
) -> Architecture:
    """The same for a model whose blocks or branches `discover` would not recognise.

    `blocks` is the path of the ModuleList (or of several, separated by commas); `attn`, `mlp` and `cross`
    name a module of each branch, relative to the block: describe(model, blocks="encoder.layers",
    attn="mix", mlp="ff").  What is said is proven like what is found.
    """
    unknown = sorted(set(branches) - set(BRANCH_KINDS))
    if unknown or not branches:
        raise ArchitectureError(f"a description names branches by attn=, mlp= or cross=; got {unknown or 'none'}")
    named = {kind: branches[kind] for kind in BRANCH_KINDS if kind in branches}
    return _discover(model, inputs, [path.strip() for path in blocks.split(",")], named)


def _discover(
    model: nn.Module, inputs: Mapping[str, Tensor] | None, paths: list[str] | None, named: Mapping[BranchKind, str]
) -> Architecture:
    given = sample_inputs(model) if inputs is None else dict(inputs)
    with traceable(model):
        trace = _trace(model, given)
        hand_on_states(model, trace, given)
        paths = paths or find_stacks(model, trace)
        blocks = [path for p in paths for path in block_paths(model, p)]
        _check_named(model, blocks[0], named)
        replay = Replay(model, blocks, given)
        reader = _StackReader(model, trace, replay, named, given)
        stacks = [reader.read(path, name, paths) for path, name in zip(paths, stack_names(paths), strict=True)]
    found = [block for stack in stacks for block in stack.blocks]
    if not any(block.branches for block in found):
        kind, reason = next(iter(found[0].kept.items()))
        raise ArchitectureError(f"no layer can be dropped; block 0 ({found[0].path}), {kind}: {reason}")
    return Architecture(tuple(stacks))


def _check_named(model: nn.Module, block: str, named: Mapping[BranchKind, str]) -> None:
    known = dict(model.get_submodule(block).named_modules())
    for module in named.values():
        if module not in known:
            raise ArchitectureError(f"{block} has no module `{module}`; it has {', '.join(filter(None, known))}")


def _trace(model: nn.Module, inputs: Mapping[str, Any], settled: bool = False) -> Trace:
    """One traced pass, or a second one where the first settles what modules the model has from then on."""
    before = dict(model.named_modules())
    versions = {name: (p, p._version) for name, p in model.named_parameters() if not p.is_inference()}
    try:
        with tracing(model) as trace:
            model(**inputs)
    except Exception as error:  # whatever the model's own code raises
        raise ArchitectureError(
            f"{type(model).__name__} does not run on a tiny batch: {type(error).__name__}: {error}{_own_dtype(model)}"
        ) from error
    for path, module in model.named_modules():
        if before.get(path) is not module:
            if not settled:
                return _trace(model, inputs, settled=True)
            raise ArchitectureError(f"{type(model).__name__} replaces {path} at every forward pass")
    for name, parameter in model.named_parameters():
        old, version = versions.get(name, (None, 0))
        if old is parameter and parameter._version != version:  # another object is accelerate, moving it in and out
            raise ArchitectureError(
                f"{type(model).__name__} changes {name} during its forward pass; switch that off in the config first "
                "(rescale_every 0 for RWKV)"
            )
    return trace


class _StackReader:
    """Reads stacks block by block; blocks that are alike are tried once."""

    def __init__(
        self, model: nn.Module, trace: Trace, replay: Replay, named: Mapping[BranchKind, str], inputs: Mapping[str, Any]
    ) -> None:
        self.model, self.trace, self.replay, self.named, self.inputs = model, trace, replay, named, inputs
        self.tried: dict[str, str] = {}  # what was tried -> what went wrong
        self.owners: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.owners[id(parameter)].append(name)
        self.memory: set[int] = set()  # what the stacks before this one made, where its own stream did not

    def read(self, path: str, name: str, stacks: list[str]) -> Stack:
        paths = block_paths(self.model, path)
        self.memory = self._made_by([other for other in stacks if other != path], paths)
        for block in paths:
            hand_on_missing(self.replay, self.trace, block)
        blocks = tuple(self._block(index, block) for index, block in enumerate(paths))
        return Stack(name, path, blocks, fixed_blocks(self.trace, self.model, paths))

    def _made_by(self, stacks: list[str], blocks: list[str]) -> set[int]:
        """Values that come from other stacks: what a decoder's cross-attention reads of its encoder."""
        calls = [call for path in blocks for call in self.trace.calls_of(path)]
        if not calls:
            return set()
        start = min(call.first for call in calls)
        made = {v for call in self.trace.calls for v in call.outputs.values() if _parent(call.path) in stacks}
        for op in self.trace.ops[:start]:
            if not made.isdisjoint(op.inputs):
                made.update(op.outputs)
        ends = stream_ends(self.trace, calls[0])
        return set() if ends and ends[1] in made else made

    def _block(self, index: int, path: str) -> Block:
        try:
            return self._assemble(index, self._flows(self.trace.calls_of(path)))
        except ValueError as error:
            return Block(index, path, Tap(path, "input", 0), Tap(path, "output"), (), kept={"block": str(error)})

    def _flows(self, calls: list[Call]) -> list[Flow]:
        """The dataflow of each of the block's streams: one, or the two of a reversible block.

        A block that is called once for each segment of the text is read at its first call and proven at all.
        Raises ValueError where it has no residual stream to which branches are added.
        """
        if not calls:
            raise ValueError("the batch does not run it")
        if any(continues(self.trace, self.replay.seen, *pair) for pair in pairwise(calls)):
            raise ValueError(
                f"it runs {len(calls)} times a pass with the same weights, so it cannot go from one of them alone; "
                f"how often it runs is for the config to say{self._counting(len(calls))}"
            )
        flow = Flow(self.trace, calls[0])
        if self.trace.values[flow.x].ndim > 3 and "input_ids" in self.inputs:
            raise ValueError("its residual stream is several streams side by side (hyper-connections, AltUp)")
        if not flow.terms and (two := reversible_flows(self.trace, calls[0])):
            return two
        if not flow.terms:
            raise ValueError("nothing is added to its input inside it: its branches are joined elsewhere")
        if flow.multiplied:
            raise ValueError("its residual stream is itself multiplied by a matrix, so it is no sum of branches")
        return [flow]

    def _counting(self, times: int) -> str:
        """The fields of the config that may say how often a block runs: ALBERT's num_hidden_layers."""
        fields = vars(getattr(self.model, "config", None) or object)
        found = [key for key, value in fields.items() if value == times and "layer" in key]
        return f" ({', '.join(found)})" if found else ""

    def _assemble(self, index: int, flows: list[Flow]) -> Block:
        path = flows[0].call.path
        ins, outs = tuple(flow.in_key for flow in flows), tuple(flow.out_key for flow in flows)
        block = Block(
            index,
            path,
            Tap(path, "input", ins if len(flows) > 1 else ins[0]),
            Tap(path, "output", outs if len(flows) > 1 else outs[0]),
            (),
            form=_whole_form(flows),
            inplace=any(flow.inplace for flow in flows),
            plain=all(flow.plain for flow in flows),
        )
        branches: list[Branch] = []
        kept: dict[str, str] = {}
        drafts, stateful, scaled = [], set(), any(flow.scaled for flow in flows)
        for flow in flows:
            reader = BranchReader(flow, partial(self._kind, flow))
            drafts += reader.read()
            stateful |= {d.kind for d in drafts if d.cuts and reader.stateful(d.cuts[0].modules)} - {"cross"}
        for draft in drafts:
            cut = self._choose(block, draft)
            if draft.kind == "attn" and len(stateful) > 1:
                cut = "other parts of its block keep their state in its cache entry"
            if isinstance(cut, str):
                kept[draft.kind] = cut
            else:
                branches.append(Branch(draft.kind, cut.modules, cut.before, cut.after, cut.delta, scaled))
        parallel = any(draft.parallel for draft in drafts) and len(drafts) > 1
        return replace(block, branches=tuple(branches), kept=kept, parallel=parallel)

    def _choose(self, block: Block, draft: BranchCandidate) -> BranchRemoval | str:
        """The first way to drop a branch with which the block still runs, or why there is none."""
        said = draft.reason
        for cut in draft.cuts:
            if shared := self._shared(block, cut):
                return f"it shares weights with {shared}"
            key = repr((type(self.model.get_submodule(block.path)), cut.modules))
            if key not in self.tried:
                self.tried[key] = self.replay.problem(block.path, cut.modules)
            if not self.tried[key]:
                return cut
            said = said or f"the block does not run without it: {self.tried[key]}"
        return said

    def _shared(self, block: Block, cut: BranchRemoval) -> str:
        """A parameter outside of the block that is one of the branch's own too."""
        for name in cut.modules:
            for parameter in self.model.get_submodule(f"{block.path}.{name}").parameters():
                other = next((p for p in self.owners[id(parameter)] if not p.startswith(block.path + ".")), "")
                if other:
                    return other
        return ""

    def _kind(self, flow: Flow, names: str, term: Term) -> BranchKind:
        for kind, module in self.named.items():
            place = f"{flow.call.path}.{module}"
            if any(flow.ops[i].scope == place or flow.ops[i].scope.startswith(place + ".") for i in term.ops):
                return kind
        if self.named:
            return "mlp" if "mlp" not in self.named else "attn"
        read = {v for i in term.ops for v in flow.ops[i].inputs}
        if not read.isdisjoint(self.memory):
            return "cross"
        guess = kind_by_name(names)
        if guess is None and self.replay.blind:
            guess = kind_by_name(" ".join(flow.ops[i].scope.removeprefix(flow.call.path) for i in term.ops))
        return guess or ("attn" if self.replay.mixes_tokens(flow, term) else "mlp")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _whole_form(flows: list[Flow]) -> Any:
    """The output form of a dropped block: its input as the stream, and the inputs that it returned unchanged."""
    call: Call = flows[0].call
    streams = {flow.out_key: flow.in_key for flow in flows}

    def member(key: int | str | None) -> str | None:
        if key in streams:
            return f"input:{streams[key]}"
        given = call.passed.get(key, call.state if key in call.nested else None)
        return None if given is None else f"input:{given}"

    return form_of(call, {key: member(key) for key in call.keys})
