"""Pruned models that share their weights with the dense one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from dropformer.prune.architecture import Layer
from dropformer.prune.outline import Outline
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the same tensors, so it takes no memory."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def without(model: nn.Module, outline: Outline, layers: Sequence[Layer]) -> Any:
    """The model without these layers, for as long as it is needed; it shares the dense model's weights."""
    return apply_surgery(sharing_copy(model), plan_surgery(outline, layers, model)) if layers else model
