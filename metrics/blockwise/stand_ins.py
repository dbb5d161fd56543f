"""Modules that replace a model's own for a while."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def device_of(model: nn.Module, path: str) -> torch.device:
    """Where the module at a path computes: the device of its weights, or of the nearest ones around it."""
    while True:
        found = next((p.device for p in model.get_submodule(path).parameters() if not p.is_meta), None)
        if found is not None:
            return found
        if not path:
            return torch.device("cpu")
        path = path.rpartition(".")[0]


def with_parameters_of(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A module like the one given, with some parameters of its own replaced; the module stays.  No hooks."""
    new = copy.copy(module)
    for name in ("_hf_hook", "_old_forward", "forward"):  # accelerate's, which would call the old module
        new.__dict__.pop(name, None)
    device = next((p.device for p in module.parameters() if not p.is_meta), next(iter(values.values())).device)
    new._parameters = {
        name: nn.Parameter(values[name].to(device), requires_grad=False) if name in values else parameter
        for name, parameter in module._parameters.items()
    }
    return new
