"""Where a model acts on its residual stream between blocks: those blocks must keep their numbers.

Qwen3-VL adds image features after its first text blocks, DeBERTa-v2 a convolution after block 0, LLaVA reads the
stream before the last vision block.  All of it is counted by block, so that a block in front of such a place cannot
get another number, nor can one be taken out there.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from dropformer.prune.architecture import Stack, within
from dropformer.prune.discovery.dataflow import CARRIES, stream_ends
from dropformer.prune.discovery.replay import traceable
from dropformer.prune.discovery.stacks import signature
from dropformer.prune.discovery.trace import Call, Trace, tracing
from dropformer.prune.samples.modalities import modalities, with_modality

TOLD = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx"}  # attributes that tell a block's number
LISTS = {"layer_types", "layers_block_type", "layer_rope_theta", "block_types"}  # by block in the config: they follow


def fixed_blocks(trace: Trace, model: nn.Module, blocks: Sequence[str]) -> int:
    """How many of a stack's leading blocks must keep their numbers, as one forward pass shows.

    That is up to the last block after which anything but the next block reads or changes the stream, and up to the
    last that is given other tensors beside the stream than the block before it that is made alike.  Blocks that the
    pass does not run, or runs several times, are passed over.
    """
    calls = [(i, found[0]) for i, path in enumerate(blocks) if len(found := trace.calls_of(path)) == 1]
    touched = [i for (i, one), (_, two) in pairwise(calls) if _touched(trace, one, two)]
    return max([*(i + 1 for i in touched), _given_otherwise(trace, model, calls)], default=0)


def _given_otherwise(trace: Trace, model: nn.Module, calls: Iterable[tuple[int, Call]]) -> int:
    """The last block that is given other tensors than one that is made alike; 0 where there is none.

    The stream, and what an earlier block made and the model hands on, are not compared.
    """
    made: set[int] = set()
    last: dict[str, dict[int | str, int]] = {}
    found = 0
    for i, call in calls:
        ends = stream_ends(trace, call)
        given = {key: v for key, v in call.inputs.items() if v not in made and not (ends and key == ends[0])}
        kind = repr(signature(model.get_submodule(call.path)))
        found = i if last.get(kind, given) != given else found
        last[kind] = given
        made.update(call.outputs.values())
    return found


def _touched(trace: Trace, one: Call, two: Call) -> bool:
    """Does the model do anything with the stream between two blocks, or read it there for later?"""
    ends, starts = stream_ends(trace, one), stream_ends(trace, two)
    if ends is None or starts is None:
        return False
    same = {ends[3]}
    for i in range(one.last, len(trace.ops)):
        op = trace.ops[i]
        if same.isdisjoint(op.inputs) or within(op.scope, two.path):
            continue
        if op.name not in CARRIES:
            return True
        same.update(op.outputs)
    return starts[1] not in same


def fixed_by_modality(model: nn.Module, stacks: Sequence[Stack]) -> dict[str, int]:
    """The same by stack for whatever the model takes beside text.

    Images and audio are run through where a batch can be made; where none can, a stack whose owner reads the number
    of a block in its forward pass keeps all of its blocks in place.
    """
    found = {stack.path: 0 for stack in stacks}
    for kind in modalities(model):
        with traceable(model):
            inputs = with_modality(model, kind)
            seen = {s.path: _seen(model, s, inputs) for s in stacks} if inputs else None
        for stack in stacks:
            count = seen[stack.path] if seen else len(stack.blocks) * reads_numbers(model, stack.path)
            found[stack.path] = max(found[stack.path], count)
    return found


def _seen(model: nn.Module, stack: Stack, inputs: Mapping[str, Any]) -> int:
    with tracing(model) as trace:
        model(**inputs)
    return fixed_blocks(trace, model, [block.path for block in stack.blocks])


def reads_numbers(model: nn.Module, path: str) -> bool:
    """May the module that owns a stack act by a block's place in its forward pass?

    Read off its source: no, where the blocks run in turn from the first on, and their number serves only to pick from
    the config's lists by block.  Yes for everything else, and where there is no source to read.
    """
    owner, _, leaf = path.rpartition(".")
    try:
        source = textwrap.dedent(inspect.getsource(type(model.get_submodule(owner)).forward))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return True
    loops = [n for n in ast.walk(tree) if isinstance(n, (ast.For, ast.comprehension)) and _mentions(n.iter, leaf)]
    in_turn = sum(_in_turn(loop.iter, leaf) for loop in loops)
    if not in_turn or in_turn != sum(isinstance(n, ast.Attribute) and n.attr == leaf for n in ast.walk(tree)):
        return True
    return any(_counts(loop) for loop in loops) or _uses(tree, {name for loop in loops for name in _numbers(loop)})


def _mentions(node: ast.AST, leaf: str) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr == leaf for n in ast.walk(node))


def _in_turn(node: ast.expr, leaf: str) -> bool:
    """Is it `self.layers`, as a whole or as far as the config says, numbered or not?"""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "enumerate" and len(node.args) == 1:
        node = node.args[0]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        if node.slice.lower or node.slice.step or not isinstance(node.slice.upper, ast.Attribute):
            return False
        node = node.value
    return isinstance(node, ast.Attribute) and node.attr == leaf


def _numbers(loop: ast.For | ast.comprehension) -> Iterator[str]:
    """The name under which a loop over blocks counts them."""
    if isinstance(loop.iter, ast.Call) and isinstance(loop.target, ast.Tuple):
        yield from (n.id for n in ast.walk(loop.target.elts[0]) if isinstance(n, ast.Name))


def _counts(loop: ast.AST) -> bool:
    """Does a loop keep a count of its own, as in `i += 1`?"""
    added = (n.value for n in ast.walk(loop) if isinstance(n, ast.AugAssign))
    return any(isinstance(value, ast.Constant) and isinstance(value.value, int) for value in added)


def _uses(tree: ast.AST, names: Collection[str]) -> bool:
    """Is a block's number, of these names or told by the block itself, used but to pick from one of LISTS?"""
    picks = [n for n in ast.walk(tree) if isinstance(n, ast.Subscript) and getattr(n.value, "attr", "") in LISTS]
    allowed = {id(n) for pick in picks for n in ast.walk(pick.slice)}
    loads = (n for n in ast.walk(tree) if isinstance(getattr(n, "ctx", None), ast.Load) and id(n) not in allowed)
    return any(getattr(n, "id", "") in names or getattr(n, "attr", "") in TOLD for n in loads)
