"""Blocks with two streams, and blocks that run several times: which stream continues which."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from dropformer.prune.architecture import within
from dropformer.prune.discovery.dataflow import ADDS, CARRIES, SCALES, Ends, Flow, stream_ends
from dropformer.prune.discovery.replay import Replay
from dropformer.prune.discovery.trace import Call, Trace, tracing


def reversible_flows(trace: Trace, call: Call) -> list[Flow]:
    """A flow for each of two streams that a block adds to in turn; [] for any other block.

    y1 = x1 + F(x2), y2 = x2 + G(y1) (RevNet, arXiv 1707.04585; Reformer).  An input and an output belong together
    where the path between them is shortest.
    """
    found = stream_ends(trace, call)
    shape = trace.values[found[1]].shape if found else None
    given = [(k, v) for k, v in call.inputs.items() if trace.values[v].shape == shape]
    made = [(k, v) for k, v in call.outputs.items() if trace.values[v].shape == shape and k not in call.passed]
    if len(given) != 2 or len(made) != 2:
        return []
    try:
        length = [[len(Flow(trace, call, (*i, *o)).steps) for o in made] for i in given]
        straight = length[0][0] + length[1][1] <= length[0][1] + length[1][0]
        ends: list[Ends] = [(*i, *o) for i, o in zip(given, made if straight else made[::-1], strict=True)]
        flows = [Flow(trace, call, one, [other]) for one, other in (ends, ends[::-1])]
    except ValueError:  # an output that an input does not reach
        return []
    one, other = ({i for t in flow.terms for i in t.ops} | {s.op for s in flow.steps} for flow in flows)
    flows[0].kept |= other
    flows[1].kept |= one
    return flows if all(flow.terms for flow in flows) else []


def hand_on_missing(replay: Replay, trace: Trace, path: str) -> None:
    """Note where a block, and each module in it, hands on a stream that the batch did not have.

    XLNet's blocks take a second stream of queries where words are to be predicted, None otherwise: a dropped layer
    must hand it on.  Found by running the block again with its stream in place of each input by position that was
    None and whose output at that position was too.
    """
    for call in trace.calls_of(path)[:1]:
        ends = stream_ends(trace, call)
        if ends is None:
            return
        for key in sorted(_unseen(call), key=str):
            args, kwargs = replay.inputs(path)
            stream = {**dict(enumerate(args)), **kwargs}[ends[0]]
            try:
                with tracing(replay.model) as second:
                    replay.model.get_submodule(path)(*args[:key], stream.clone(), *args[key + 1 :], **kwargs)
            except Exception:  # no stream, but a mask or the like
                continue
            for inner in (c for c in trace.calls if within(c.path, path)):
                inner.passed |= {k: k for k in _unseen(inner) if _handed_on(second, inner.path, k)}  # type: ignore[misc]


def hand_on_states(model: nn.Module, trace: Trace, inputs: Mapping[str, Any]) -> None:
    """Note which modules hand on a recurrent state that the batch, run without a cache, did not have (RWKV).

    Found by a second pass with a cache, for models that transformers calls stateful.
    """
    if not getattr(model, "_is_stateful", False) or "use_cache" not in inputs:
        return
    try:
        with tracing(model) as cached:
            model(**{**inputs, "use_cache": True})
    except Exception:  # whatever the model's own code raises
        return
    handed = {call.path: call.passed for call in cached.calls}
    for call in trace.calls:
        unseen = {*call.keys} - call.outputs.keys() - call.passed.keys() - call.nested
        call.passed |= {key: given for key, given in handed.get(call.path, {}).items() if key in unseen}


def _unseen(call: Call) -> Collection[Any]:
    return (call.missing & {*call.keys}) - call.outputs.keys() - call.passed.keys() - call.nested


def _handed_on(trace: Trace, path: str, key: int) -> bool:
    """Does a module have a tensor of one shape for input and output of a number?"""
    call = next(iter(trace.calls_of(path)), None)
    if call is None or key not in call.inputs or key not in call.outputs:
        return False
    return trace.values[call.inputs[key]].shape == trace.values[call.outputs[key]].shape


def continues(trace: Trace, blocks: Collection[str], call: Call, later: Call) -> bool:
    """Does the residual stream lead from one call of a block to a later one: is the block run again in depth?

    Not so where the later call reads the next segment of a text, which meets the first in memories at most.
    """
    ends, begins = stream_ends(trace, call), stream_ends(trace, later)
    if ends is None or begins is None:
        return True
    stream = {ends[3]}
    entered = {c.first: c for c in trace.calls if c.path in blocks}
    at = call.last
    while at < later.first:
        block = entered.get(at)
        if block and (through := stream_ends(trace, block)):
            stream |= {through[3]} if through[1] in stream else set()
            at = max(block.last, at + 1)
            continue
        op = trace.ops[at]
        if op.name in ADDS | CARRIES | SCALES and not stream.isdisjoint(op.inputs):
            stream.update(op.outputs)
        at += 1
    return begins[1] in stream
