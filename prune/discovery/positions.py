"""Where a model acts on its residual stream between blocks: those blocks must keep their numbers.

Qwen3-VL adds image features after its first text blocks, DeBERTa-v2 a convolution after block 0, LLaVA reads the
stream before the last vision block.  All of it is counted by block, so that a block in front of such a place cannot
get another number, nor can one be taken out there.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from dropformer.prune.architecture import Stack, within
from dropformer.prune.discovery.dataflow import CARRIES, stream_ends
from dropformer.prune.discovery.replay import traceable
from dropformer.prune.discovery.trace import Call, Trace, tracing
from dropformer.prune.samples.modalities import modalities, with_modality

LISTS = {"layer_types", "layers_block_type", "layer_rope_theta", "block_types"}  # by block in the config: they follow


def fixed_blocks(trace: Trace, blocks: Sequence[str]) -> int:
    """How many of a stack's leading blocks must keep their numbers, as one forward pass shows.

    That is up to the last block after which anything but the next block reads or changes the stream.  Blocks that
    the pass does not run, or runs several times, are passed over.
    """
    calls = [(i, found[0]) for i, path in enumerate(blocks) if len(found := trace.calls_of(path)) == 1]
    touched = [i for (i, one), (_, two) in pairwise(calls) if _touched(trace, one, two)]
    return max(touched, default=-1) + 1


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
    with tracing(model) as trace, torch.no_grad():
        model(**inputs)
    return fixed_blocks(trace, [block.path for block in stack.blocks])


def reads_numbers(model: nn.Module, path: str) -> bool:
    """Does the module that owns a stack use a block's number in its forward pass, other than to pick from the
    config's lists by block?  Read off its source; yes where there is none to read."""
    owner, _, leaf = path.rpartition(".")
    try:
        source = textwrap.dedent(inspect.getsource(type(model.get_submodule(owner)).forward))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return True
    return any(_uses(tree, name) for name in _numbers(tree, leaf)) or _picks(tree, leaf)


def _numbers(tree: ast.AST, leaf: str) -> Iterator[str]:
    """Names of loop variables that count the blocks of `self.<leaf>`."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.For, ast.comprehension)) or not isinstance(node.iter, ast.Call):
            continue
        if getattr(node.iter.func, "id", "") in ("enumerate", "range") and _mentions(node.iter, leaf):
            target = node.target.elts[0] if isinstance(node.target, ast.Tuple) else node.target
            if isinstance(target, ast.Name):
                yield target.id


def _mentions(node: ast.AST, leaf: str) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr in (leaf, "num_hidden_layers") for n in ast.walk(node))


def _uses(tree: ast.AST, name: str) -> bool:
    """Is a number used but to pick from one of LISTS?"""
    picks = [n for n in ast.walk(tree) if isinstance(n, ast.Subscript) and getattr(n.value, "attr", "") in LISTS]
    allowed = {id(n) for pick in picks for n in ast.walk(pick.slice)}
    loads = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load))
    return any(id(n) not in allowed for n in loads)


def _picks(tree: ast.AST, leaf: str) -> bool:
    """Is a single block taken by its number, as in `self.layers[0]`?"""
    return any(
        isinstance(n, ast.Subscript) and getattr(n.value, "attr", "") == leaf and not isinstance(n.slice, ast.Slice)
        for n in ast.walk(tree)
    )
