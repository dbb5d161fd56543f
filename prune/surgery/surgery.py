"""Removal of layers from a live model: dropped branches cost nothing and hold no KV cache."""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import BlockMap, Surgery, map_blocks, skipped_modules
from dropformer.prune.discovery.stacks import settings
from dropformer.prune.errors import ArchitectureError, reason
from dropformer.prune.loading.described import config_from
from dropformer.prune.loading.device import hooks_of
from dropformer.prune.loading.modeling import empty_cache_entries, number_attentions, pruned_model_class
from dropformer.prune.loading.skipped_modules import LinearReplacement, skip_modules
from dropformer.prune.outline import Outline, StackOutline
from dropformer.prune.rungs.agent import Agents
from dropformer.prune.surgery.block_numbers import BlockNumbers
from dropformer.prune.surgery.config import pruned_config
from dropformer.prune.surgery.rungs import check_rungs
from dropformer.prune.surgery.side_files import followed_files
from dropformer.prune.window import Window

M = TypeVar("M", bound=nn.Module)


def plan_surgery(
    outline: Outline,
    layers: Sequence[Layer],
    model: nn.Module,
    mapped: Mapping[Layer, Mapping[str, Any]] | None = None,
    rungs: Mapping[Layer, Window | Agents] | None = None,
    folder: Path | None = None,
) -> Surgery:
    """How `layers` are removed: by the shortest model that reproduces the remaining blocks.

    A shortened model is used only if a model built from its config has the same modules and settings
    in every block; else emptied blocks keep their places, as they do in any module that is not a
    transformers model.  `model` may be on the meta device.  `mapped`: those of the layers that leave a linear
    map behind (`BlockMap.mapped`); `rungs`: attention layers that stay and attend to less.  `folder`: where
    the model's files lie, whose settings must follow as well.  Raises PlanError for a rung on a module that takes
    none.
    """
    check_rungs(outline, model, rungs or {})
    block_map = map_blocks(outline, layers, isinstance(model, PreTrainedModel), mapped, rungs)
    note = _held(outline, block_map)
    if isinstance(model, PreTrainedModel) and not block_map.in_place(outline):
        try:
            fields = pruned_config(model.config.to_dict(), outline, block_map)
            followed_generation(model, outline, block_map)
            if folder:
                followed_files(folder, outline, block_map)
            _check_shortened(model, outline, block_map, fields)
        except ArchitectureError as error:
            block_map, note = map_blocks(outline, layers, False, mapped, rungs), str(error)
    return Surgery(outline, tuple(layers), block_map, note)


def _held(outline: Outline, block_map: BlockMap) -> str:
    """Why empty blocks among the first cannot be removed; "" where there are none."""
    for stack in outline.stacks:
        if stack.fixed and any(block.empty for block in block_map.stacks[stack.name][: stack.fixed]):
            return (
                f"the model acts on the residual stream between the first {stack.fixed} blocks of {stack.path}, or "
                "gives each of them tensors of its own"
            )
    return ""


def apply_surgery(model: M, surgery: Surgery) -> M:
    """Apply a surgery to the model in place, and return it.

    A transformers model becomes a subclass of its native class (or stays what it is when it packs) and
    its config follows; any other module only has the dropped branches' modules replaced.
    """
    if isinstance(model, PreTrainedModel):
        _restructure(model, surgery)
    else:
        skip_modules(model, skipped_modules(surgery.outline, surgery.block_map))
    _install(model, surgery.tensors)
    return model


def _restructure(model: PreTrainedModel, surgery: Surgery) -> None:
    fields = pruned_config(model.config.to_dict(), surgery.outline, surgery.block_map)
    generation = followed_generation(model, surgery.outline, surgery.block_map)
    for stack in surgery.outline.stacks:
        _rearrange(model, surgery, stack.path, stack.name)
    skip_modules(model, skipped_modules(surgery.outline, surgery.block_map))
    _adopt(model.config, config_from(fields))
    if generation is not None:
        model.generation_config = generation
    if not surgery.block_map.packed:
        model.__class__ = pruned_model_class(type(model), type(model.config))
        empty_cache_entries(model.config)
        number_attentions(model)


def followed_generation(model: PreTrainedModel, outline: Outline, block_map: BlockMap) -> GenerationConfig | None:
    """A model's generation settings after a surgery; None where none of them changes.  Raises ArchitectureError."""
    old = getattr(model, "generation_config", None)
    if old is None:
        return None
    fields = {key: value for key, value in vars(old).items() if not key.startswith("_")}
    new = BlockNumbers(outline, block_map).generation(fields)
    if new == fields:
        return None
    changed = copy.copy(old)
    for key in fields:
        if key not in new:
            delattr(changed, key)
        elif new[key] != fields[key]:
            setattr(changed, key, new[key])
    return changed


def _install(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model new parameters; tensors that it shares with the dense model stay as they are.

    Each keeps the dtype of the one it replaces (some families have a few in float32); a linear map has the model's.
    """
    like = next(model.parameters())
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, leaf)
        dtype = like.dtype if isinstance(module, LinearReplacement) else old.dtype
        if old.is_meta and _offload_instead(module, leaf, tensor.to("cpu", dtype, copy=True)):
            continue
        device = like.device if old.is_meta else old.device
        new = nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=old.requires_grad)
        setattr(module, leaf, new)


def _offload_instead(module: nn.Module, leaf: str, tensor: Tensor) -> bool:
    """Have accelerate's hook bring a new tensor in the place of an offloaded one; False where no hook brings it.

    The hooks of a sharing copy are its own, and the map that they share with the dense model stays as it is.
    """
    hooks = [hook for hook in hooks_of(module) if getattr(hook, "offload", False)]
    for hook in hooks:
        hook.weights_map = ChainMap({leaf: tensor}, hook.weights_map)
    return bool(hooks)


def _adopt(config: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Turn `config` into `new` in place, because every submodule holds a reference to it."""
    kept = {key: value for key, value in vars(config).items() if key.startswith("_")}
    for key, value in vars(new).items():
        old = vars(config).get(key)
        if isinstance(old, PreTrainedConfig) and isinstance(value, PreTrainedConfig):
            _adopt(old, value)
            new.__dict__[key] = old
    config.__class__ = new.__class__
    config.__dict__.clear()
    config.__dict__.update(vars(new) | {k: v for k, v in kept.items() if k != "_heterogeneity_spec"})


def _rearrange(model: nn.Module, surgery: Surgery, path: str, name: str) -> None:
    """Give the stack its new blocks and the blocks their new numbers."""
    old = list(model.get_submodule(path).children())
    blocks = surgery.block_map.stacks[name]
    if all(b.source == b.mlp == i for i, b in enumerate(blocks)) and len(blocks) == len(old):
        return
    stack = surgery.outline.stack(name)
    mlps = {}
    for b in blocks:
        branch = stack.branch("mlp", b.mlp)
        mlps[b.mlp] = {n: old[b.mlp].get_submodule(n) for n in branch.modules} if branch and b.mlp != b.source else {}
    for new, b in enumerate(blocks):
        for module_name, module in mlps[b.mlp].items():
            parent, _, leaf = module_name.rpartition(".")
            setattr(old[b.source].get_submodule(parent), leaf, module)
        _renumber(old[b.source], stack, b.source, new)
    parent, _, leaf = path.rpartition(".")
    container = type(model.get_submodule(path))
    setattr(model.get_submodule(parent), leaf, container([old[b.source] for b in blocks]))


def _renumber(block: nn.Module, stack: StackOutline, source: int, new: int) -> None:
    """Tell a block's modules their new number: that of the block, or of their entry in the cache."""
    attention = stack.branch("attn", source)
    names = tuple(attention.modules) if attention and stack.caches > 1 else ()
    module: Any
    for name, module in block.named_modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and number >= 0:
            several = any(name == n or name.startswith(n + ".") for n in names)
            module.layer_idx = new * stack.caches + number % stack.caches if several else new


def _check_shortened(model: PreTrainedModel, outline: Outline, block_map: BlockMap, fields: dict[str, Any]) -> None:
    """Raise ArchitectureError unless a model built from the new config has the blocks that we keep."""
    built = _built(type(model), block_map, fields)
    _check_around(model, built, outline)
    for stack in outline.stacks:
        old, new = (list(m.get_submodule(stack.path).children()) for m in (model, built))
        if len(new) != len(block_map.stacks[stack.name]):
            raise ArchitectureError(f"blocks stay where they are: no known field of config.json counts {stack.path}")
        for i, block in enumerate(block_map.stacks[stack.name]):
            mine = _signature(old[block.source], stack, block.source, block.mlp, old)
            theirs = _signature(new[i], stack, block.source, block.source, new)
            skipped = {n for kind in block.skipped for n in stack.modules(kind, block.source)}
            skipped |= set(block_map.mapped.get(Layer("attn", block.source, stack.name), {}))
            for path in set(mine) | set(theirs):
                if any(path == n or path.startswith(n + ".") for n in skipped):
                    continue
                if mine.get(path) != theirs.get(path):
                    raise ArchitectureError(
                        f"block {block.source} cannot become block {i}: {path or 'it'} depends on the number"
                    )


def _built(native: type[PreTrainedModel], block_map: BlockMap, fields: dict[str, Any]) -> PreTrainedModel:
    """A model without weights from a config.json.  Raises ArchitectureError where its family does not allow it."""
    try:
        config = config_from(fields)
        with torch.device("meta"):
            if block_map.packed:
                return native._from_config(config)
            return pruned_model_class(native, type(config))(config)
    except Exception as error:  # families check their fields in many ways, none of which is ours to list
        said = reason(error)
        raise ArchitectureError(f"blocks stay where they are; transformers builds no shorter model: {said}") from None


def _check_around(model: nn.Module, built: nn.Module, outline: Outline) -> None:
    """Raise ArchitectureError where a parameter outside of the stacks is shaped by their length (Gemma 4's
    embeddings of every layer)."""
    prefixes = tuple(stack.path + "." for stack in outline.stacks)
    mine, theirs = (
        {name: p.shape for name, p in m.named_parameters() if not name.startswith(prefixes)} for m in (model, built)
    )
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise ArchitectureError(f"blocks stay where they are: {name} depends on their number")


def _signature(block: nn.Module, stack: StackOutline, source: int, mlp: int, blocks: list[nn.Module]) -> dict[str, Any]:
    """What a block is made of: for each module its class, its parameters' shapes and its settings."""
    found = {name: settings(module) for name, module in block.named_modules()}
    branch = stack.branch("mlp", mlp) if mlp != source else None
    if branch:
        for name in branch.modules:
            found = {n: s for n, s in found.items() if n != name and not n.startswith(name + ".")}
            for inner, module in blocks[mlp].get_submodule(name).named_modules():
                found[f"{name}.{inner}" if inner else name] = settings(module)
    return found
