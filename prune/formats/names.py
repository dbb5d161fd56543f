"""What each tensor of a dense checkpoint's files is called in the pruned one.

Families rename tensors as they load (Mixtral's experts, a bare trunk without its prefix); `names` says which
parameter each tensor is, as `described.parameter_names` asks transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from dropformer.prune.block_map import BlockMap, new_name
from dropformer.prune.outline import Outline, StackOutline


def renaming(
    outline: Outline, block_map: BlockMap, names: Mapping[str, str], prefix: str
) -> Callable[[str], str | None]:
    """The name of each tensor of the files in the pruned checkpoint; None for removed ones."""

    def rename(tensor: str) -> str | None:
        parameter = names[tensor]
        for candidate in (parameter, f"{prefix}.{parameter}"):
            stack = _stack_of(outline, candidate)
            if stack is None:
                continue
            old = int(candidate.removeprefix(stack.path + ".").partition(".")[0])
            if old >= stack.blocks:  # a multi-token prediction head: see `numbered_heads`
                return tensor if len(block_map.stacks[stack.name]) == stack.blocks else None
            new = new_name(outline, block_map, candidate)
            return None if new is None else _renumber(tensor, old, _index(new, stack))
        return tensor

    return rename


def numbered_heads(outline: Outline, block_map: BlockMap, names: Mapping[str, str], prefix: str) -> set[str]:
    """Names of the stacks after whose blocks the files hold more, which is dropped because the stack gets shorter.

    Those are multi-token prediction heads that count on as if they were blocks (DeepSeek V3's layer 61).
    transformers leaves such a head out by its very number, so under another one it would be a stray tensor.
    """
    found = set()
    for parameter in names.values():
        for candidate in (parameter, f"{prefix}.{parameter}"):
            stack = _stack_of(outline, candidate)
            if stack and _index(candidate, stack) >= stack.blocks > len(block_map.stacks[stack.name]):
                found.add(stack.name)
    return found


def _stack_of(outline: Outline, parameter: str) -> StackOutline | None:
    for stack in outline.stacks:
        if re.match(rf"{re.escape(stack.path)}\.\d+\.", parameter):
            return stack
    return None


def _index(parameter: str, stack: StackOutline) -> int:
    return int(parameter.removeprefix(stack.path + ".").partition(".")[0])


def _renumber(tensor: str, old: int, new: int) -> str:
    return tensor if old == new else re.sub(rf"(^|\.){old}\.", rf"\g<1>{new}.", tensor, count=1)
