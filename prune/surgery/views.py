"""Pruned models that share their weights with the dense one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from dropformer.prune.architecture import Layer
from dropformer.prune.loading.device import hooks_of
from dropformer.prune.outline import Outline
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery

OFFLOADED = ("weights_map", "tied_params_map")  # what a hook of accelerate holds tensors in


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the same tensors, so it takes no memory.

    Offloaded weights, which accelerate's hooks hold in maps, are shared as well.
    """
    held = [getattr(hook, name, None) for m in model.modules() for hook in hooks_of(m) for name in OFFLOADED]
    shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers(), *held) if x is not None}
    return copy.deepcopy(model, shared)


def without(model: nn.Module, outline: Outline, layers: Sequence[Layer]) -> Any:
    """The model without these layers, for as long as it is needed; it shares the dense model's weights."""
    return apply_surgery(sharing_copy(model), plan_surgery(outline, layers, model)) if layers else model
