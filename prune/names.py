"""From the tensor names in a checkpoint's files to the parameter names of the model, and back after a drop.

Families rename tensors as they load (Mixtral's experts, a bare trunk without its prefix); transformers
knows how, and is asked rather than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from dropformer.prune.arrange import Arrangement, new_name
from dropformer.prune.outline import Outline, StackOutline


def meta_model(native: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this class without weights, to ask it about names."""
    with torch.device("meta"):
        return native(config)


def parameter_names(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """Tensor name in the files -> parameter name in the model (the tensor's own name where none is known)."""
    rename = renamed_on_load(model)
    return {name: rename(name)[0] for name in tensors}


def renamed_on_load(model: PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """How transformers renames a tensor as it loads: the parameter's name, and the pattern of the conversion
    that makes the parameter from it and others (None where the tensor is the parameter)."""
    transforms: list[Any] = list(get_model_conversion_mapping(model))
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    state = model.state_dict()
    return lambda name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)


def renaming(
    outline: Outline, arrangement: Arrangement, names: dict[str, str], prefix: str
) -> Callable[[str], str | None]:
    """What each tensor of the files is called in the pruned checkpoint; None for those that go."""

    def rename(tensor: str) -> str | None:
        parameter = names[tensor]
        for candidate in (parameter, f"{prefix}.{parameter}"):
            stack = _stack_of(outline, candidate)
            if stack is None:
                continue
            old = int(candidate.removeprefix(stack.path + ".").partition(".")[0])
            if old >= stack.blocks:  # a multi-token prediction head: see `numbered_heads`
                return tensor if len(arrangement.stacks[stack.name]) == stack.blocks else None
            new = new_name(outline, arrangement, candidate)
            return None if new is None else _renumber(tensor, old, _index(new, stack))
        return tensor

    return rename


def numbered_heads(outline: Outline, arrangement: Arrangement, names: dict[str, str], prefix: str) -> set[str]:
    """Names of the stacks after whose blocks the files hold more, that goes because the stack gets shorter.

    Those are multi-token prediction heads that count on as if they were blocks (DeepSeek V3's layer 61).
    transformers leaves such a head out by its very number, so under another one it would be a stray tensor.
    """
    found = set()
    for parameter in names.values():
        for candidate in (parameter, f"{prefix}.{parameter}"):
            stack = _stack_of(outline, candidate)
            if stack and _index(candidate, stack) >= stack.blocks > len(arrangement.stacks[stack.name]):
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
