"""The outline of a model without weights, traced on as few of its blocks as show every kind.

Tracing 80 equal blocks takes seconds and tells nothing that the first two did not.  So only a prefix of the stack is
run, which keeps indices, masks and cache entries as they are, and the other blocks are described by the ones whose
modules, settings and shapes they share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.stacks import signature
from dropformer.prune.discovery.summarize import all_alike, summarize
from dropformer.prune.files.config_json import BLOCK_COUNTS
from dropformer.prune.loading.parts import text_config
from dropformer.prune.outline import BlockOutline, BranchOutline, Outline, StackOutline


def outline_without_weights(model: nn.Module) -> Outline:
    """The outline that `summarize(model, discover(model))` gives for a model on the meta device, sooner.

    Falls back to the whole model where blocks share parameters, or where the prefix does not run by itself.
    Raises ArchitectureError where nothing can be dropped.
    """
    blocks = _largest_list(model)
    like = _representatives(list(blocks)) if blocks is not None else []
    if blocks is None or max(like, default=0) + 1 >= len(blocks):
        return summarize(model, discover(model))
    parameters = sum(p.numel() for p in model.parameters())
    try:
        with _shortened(model, blocks, max(like) + 1):
            short = summarize(model, discover(model))
        stack = next(stack for stack in short.stacks if model.get_submodule(stack.path) is blocks)
    except Exception:  # whatever the model's own code raises without its last blocks
        return summarize(model, discover(model))
    whole = _expanded(stack, like, alike=all_alike(blocks))
    stacks = [whole if s is stack else s for s in short.stacks]
    return short.model_copy(update={"stacks": stacks, "parameters": parameters})


def _largest_list(model: nn.Module) -> nn.ModuleList | None:
    """The module list with most parameters, in which decoders keep their blocks."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()), default=None)


def _representatives(blocks: Sequence[nn.Module]) -> list[int]:
    """For each block, itself or the second block of its kind: the first of a stack may be special by its place.

    Blocks A A B A B B are described by 0 1 2 1 4 4.  Blocks that share parameters describe themselves.
    """
    owners = [{id(p) for p in block.parameters()} for block in blocks]
    if sum(map(len, owners)) != len(set().union(*owners)):
        return list(range(len(blocks)))
    seen: dict[str, list[int]] = {}
    for index, block in enumerate(blocks):
        seen.setdefault(repr(signature(block)), []).append(index)
    like = list(range(len(blocks)))
    for indices in seen.values():
        for index in indices[2:]:
            like[index] = indices[1]
    return like


@contextmanager
def _shortened(model: Any, blocks: nn.ModuleList, count: int) -> Iterator[None]:
    """Inside the `with`, the model has its first `count` blocks only, and its config says so."""
    config = text_config(model)
    tail, fields = list(blocks)[count:], {name: getattr(config, name, None) for name in BLOCK_COUNTS[""]}
    changed = {name: value for name, value in fields.items() if value == len(blocks)}
    del blocks[count:]
    try:
        for name in changed:
            setattr(config, name, count)
        yield
    finally:
        blocks.extend(tail)
        for name, value in changed.items():
            setattr(config, name, value)


def _expanded(stack: StackOutline, like: Sequence[int], alike: bool) -> StackOutline:
    """The stack with all of its blocks; `like` names the traced block that describes each."""

    def spread(part: BranchOutline | BlockOutline) -> Any:
        return part.model_copy(update={"blocks": [i for i, traced in enumerate(like) if traced in part.blocks]})

    return stack.model_copy(
        update={
            "blocks": len(like),
            "alike": alike,
            "branches": [spread(branch) for branch in stack.branches],
            "rest": [spread(block) for block in stack.rest],
        }
    )
