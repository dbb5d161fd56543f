"""Blocks with two streams, and blocks that run several times: which stream continues which."""

from __future__ import annotations

from collections.abc import Collection

from dropformer.prune.discovery.dataflow import ADDS, CARRIES, SCALES, Ends, Flow, stream_ends
from dropformer.prune.discovery.trace import Call, Trace


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
