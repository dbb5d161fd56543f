"""Pruned models that share their weights with the dense one."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import Surgery, map_blocks
from dropformer.prune.discovery.replay import traceable
from dropformer.prune.loading.device import hooks_of
from dropformer.prune.outline import Outline
from dropformer.prune.samples.inputs import first_output
from dropformer.prune.samples.modalities import sample_batches
from dropformer.prune.surgery.surgery import M, apply_surgery, plan_surgery

OFFLOADED = ("weights_map", "tied_params_map")  # what a hook of accelerate holds tensors in


def sharing_copy(model: M) -> M:
    """A copy of the module tree whose parameters and buffers are the same tensors, so it takes no memory.

    Offloaded weights, which accelerate's hooks hold in maps, are shared as well.
    """
    held = [getattr(hook, name, None) for m in model.modules() for hook in hooks_of(m) for name in OFFLOADED]
    shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers(), *held) if x is not None}
    return copy.deepcopy(model, shared)


def share_equal(model: nn.Module, dense: nn.Module) -> int:
    """Give a model the dense one's parameters wherever its own are the same bit for bit; the bytes that are shared.

    Names do not matter, so that blocks may have moved.  Parameters on the CPU are shared with equal ones on another
    device too, where the model has no device map: what is left then belongs on that device (`model.to`).
    Time: one comparison of each pair of equal tensors; memory: one tensor.
    """
    known: dict[Hashable, list[nn.Parameter]] = defaultdict(list)
    for parameter in dense.parameters():
        if not parameter.is_meta:
            known[_sample(parameter)].append(parameter)
    shared: dict[int, nn.Parameter] = {}
    for module in model.modules():
        anywhere = next(hooks_of(module), None) is None
        for leaf, own in module.named_parameters(recurse=False):
            for twin in () if own.is_meta or own is shared.get(id(own)) else known.get(_sample(own), ()):
                near = twin.device == own.device or (anywhere and own.device.type == "cpu")
                if near and equal_bits(twin, own):
                    module._parameters[leaf] = shared[id(twin)] = twin
                    break
    return sum(twin.numel() * twin.element_size() for twin in shared.values())


def _sample(tensor: Tensor) -> Hashable:
    """Equal for equal tensors, and hardly ever for others: shape, type and some of the numbers."""
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // 64)][:64].cpu().contiguous()
    return tensor.shape, tensor.dtype, some.view(torch.uint8).numpy().tobytes()


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    left, right = one.detach().contiguous(), other.detach().to(one.device).contiguous()
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8)) if left.ndim else torch.equal(left, right)


def without(model: nn.Module, outline: Outline, layers: Sequence[Layer]) -> Any:
    """The model without these layers, for as long as it is needed; it shares the dense model's weights."""
    return apply_surgery(sharing_copy(model), plan_surgery(outline, layers, model)) if layers else model


def proven(model: nn.Module, surgery: Surgery) -> Surgery:
    """The surgery; or, where renumbered blocks give other outputs, one that keeps every block at its place.

    Both are run on a tiny batch of each modality that the model takes.  Time: two forward passes a batch; memory:
    none for weights.
    """
    if not isinstance(model, PreTrainedModel) or surgery.block_map.in_place(surgery.outline):
        return surgery
    if any(p.is_meta for p in model.parameters()):
        return surgery
    still = map_blocks(surgery.outline, surgery.layers, False, surgery.block_map.mapped, surgery.block_map.rungs)
    fixed = replace(surgery, block_map=still, note="a block at another place gives other outputs")
    moved, unmoved = (apply_surgery(sharing_copy(model), each) for each in (surgery, fixed))
    for inputs in sample_batches(model):
        if not _alike(_output(moved, inputs), _output(unmoved, inputs)):
            return fixed
    return surgery


def _output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with traceable(model):
        return first_output(model(**inputs))


def _alike(one: Tensor, other: Tensor) -> bool:
    """Equal up to the order of sums."""
    close = 1e-4 * other.abs().max().clamp_min(1.0)
    return one.shape == other.shape and bool(torch.equal(one, other) or (one - other).abs().max() <= close)
