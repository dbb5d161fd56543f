"""Count what each branch of a model owns: parameters, and cache elements per token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dropformer.prune.architecture import Architecture, Block, Branch, Stack, owns
from dropformer.prune.discovery.positions import fixed_by_modality
from dropformer.prune.discovery.replay import traceable
from dropformer.prune.discovery.stacks import signature
from dropformer.prune.loading.described import auto_names, native_class
from dropformer.prune.outline import BlockOutline, BranchOutline, Outline, StackOutline
from dropformer.prune.samples.inputs import sample_inputs


def summarize(model: nn.Module, architecture: Architecture) -> Outline:
    """The architecture as data, with what each branch weighs.  Meta models will do."""
    kv = _cache_elements(model, architecture)
    writes = next((s for s in architecture.stacks if s.name in ("", "decoder")), architecture.stacks[0])
    fixed = fixed_by_modality(model, architecture.stacks)
    stacks = [_stack(model, stack, kv if stack is writes else {}, fixed[stack.path]) for stack in architecture.stacks]
    autos = auto_names(native_class(type(model))) if isinstance(model, PreTrainedModel) else []
    return Outline(stacks=stacks, parameters=sum(p.numel() for p in model.parameters()), autos=autos)


def _stack(model: nn.Module, stack: Stack, kv: dict[int, tuple[int, int | None]], fixed: int) -> StackOutline:
    caches = _caches(model, stack)
    groups: dict[tuple, list[int]] = defaultdict(list)
    samples: dict[tuple, dict[str, Any]] = {}
    for block in stack.blocks:
        for branch in block.branches:
            entries = range(block.index * caches, (block.index + 1) * caches) if branch.kind == "attn" else ()
            held = [kv[entry] for entry in entries if entry in kv]
            cache, windows = sum(elements for elements, _ in held), [window for _, window in held if window]
            fields = {
                "kind": branch.kind,
                "modules": branch.modules,
                "parameters": branch_parameters(model, block, branch),
                "kv": cache,
                "window": max(windows) if windows and len(windows) == len(held) else None,
            }
            key = (branch.kind, repr(branch.modules), fields["parameters"], cache, fields["window"])
            groups[key].append(block.index)
            samples[key] = fields
    branches = [BranchOutline(blocks=blocks, **samples[key]) for key, blocks in groups.items()]
    parallel = any(block.parallel for block in stack.blocks)
    return StackOutline(
        name=stack.name,
        path=stack.path,
        blocks=len(stack.blocks),
        parallel=parallel,
        caches=caches,
        alike=all_alike(model.get_submodule(block.path) for block in stack.blocks),
        fixed=max(stack.fixed, fixed),
        branches=branches,
        rest=_rest(model, stack),
    )


def all_alike(blocks: Iterable[nn.Module]) -> bool:
    """Are all blocks made of the same modules, with the same settings?"""
    first, *others = map(signature, blocks)
    return all(other == first for other in others)


def _caches(model: nn.Module, stack: Stack) -> int:
    """How many cache entries each block has, by the numbers that its modules carry (LongCat: two attentions)."""
    found: dict[int, set[int]] = {}
    for block in stack.blocks:
        if branch := block.branch("attn"):
            owned = (model.get_submodule(f"{block.path}.{name}") for name in branch.modules)
            numbers = {getattr(inner, "layer_idx", None) for module in owned for inner in module.modules()}
            found[block.index] = {number for number in numbers if isinstance(number, int)}
    count = max(map(len, found.values()), default=1)
    regular = all(numbers == set(range(i * count, (i + 1) * count)) for i, numbers in found.items())
    return count if regular and count else 1


def _rest(model: nn.Module, stack: Stack) -> list[BlockOutline]:
    """What blocks are beyond their branches, alike ones together; those of which there is nothing to say left out."""
    groups: dict[str, BlockOutline] = {}
    for block in stack.blocks:
        whole = model.get_submodule(block.path).parameters()
        parameters = _counted(whole) - _counted(_parameters(model, block, *block.branches))
        fields = {
            "plain": block.plain,
            "form": None if (block.plain and not parameters) or block.kept else block.form,
            "parameters": parameters,
            "kept": block.kept,
        }
        found = groups.setdefault(repr(fields), BlockOutline(blocks=[], **fields))
        found.blocks.append(block.index)
    return [group for group in groups.values() if group != BlockOutline(blocks=group.blocks)]


def branch_parameters(model: nn.Module, block: Block, branch: Branch) -> int:
    """Parameters that are removed with a branch; each shared one counts once."""
    return _counted(_parameters(model, block, branch))


def _parameters(model: nn.Module, block: Block, *branches: Branch) -> Iterator[nn.Parameter]:
    for branch in branches:
        for path in branch.modules:
            named = model.get_submodule(f"{block.path}.{path}").named_parameters(prefix=path)
            yield from (parameter for name, parameter in named if owns(branch.modules, name))


def _counted(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())


def _cache_elements(model: nn.Module, architecture: Architecture) -> dict[int, tuple[int, int | None]]:
    """Cache elements per token of each entry, and its sliding window, off the cache of a tiny forward pass.

    None where that fails.
    """
    inputs = sample_inputs(model)
    if "input_ids" not in inputs:
        return {}
    try:
        with traceable(model):
            cache = getattr(model(**{**inputs, "use_cache": True}), "past_key_values", None)
    except Exception:  # whatever the model's own code raises: BLT has no cache in transformers 5.23
        return {}
    tokens = inputs["input_ids"].numel()
    cache = getattr(cache, "self_attention_cache", cache)
    found = {}
    for index, layer in enumerate(getattr(cache, "layers", [])):
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        elements = sum(t.numel() for t in held if isinstance(t, torch.Tensor)) // tokens
        found[index] = elements, getattr(layer, "sliding_window", None)
    return found
