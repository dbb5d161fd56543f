"""Which devices a model's weights are on, where its inputs belong, and how much memory is free there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def input_device(model: nn.Module) -> torch.device:
    """Where inputs belong: the first weight's device or, where weights are offloaded, the one they are moved to.

    Weights that are not there yet, on the meta device without a hook, are passed over; meta where all are.
    """
    found: torch.device | None = None
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found = next(executions(module), parameter.device) if parameter.is_meta else parameter.device
            if found.type != "meta":
                return found
    return found or torch.device("cpu")


def gpus_of(model: nn.Module) -> list[torch.device]:
    """The CUDA devices that hold a model's weights or compute with them, in the order of their numbers."""
    found = {p.device for p in model.parameters()}
    found |= {device for module in model.modules() for device in executions(module)}
    return sorted((device for device in found if device.type == "cuda"), key=lambda device: device.index or 0)


def is_offloaded(model: nn.Module) -> bool:
    """Are some weights fetched from host memory or disk for each forward pass, by accelerate's hooks?"""
    return any(getattr(hook, "offload", False) for module in model.modules() for hook in hooks_of(module))


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks on one module; none where it has no device map."""
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", () if hook is None else (hook,))


OVERRIDES = ("_hf_hook", "_old_forward", "forward")
"""Attributes by which accelerate has a module move its inputs and weights; in a copy they still call the original."""


def executions(module: nn.Module) -> Iterator[torch.device]:
    """The devices on which accelerate's hooks have a module compute."""
    found = (getattr(hook, "execution_device", None) for hook in hooks_of(module))
    numbered = (f"cuda:{device}" if isinstance(device, int) else device for device in found if device is not None)
    return map(torch.device, numbered)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device: free, or held unused by torch, below its own limit."""
    if device.type != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _device: 1.0)(device)
    return max(0, min(free + reserved - allocated, int(fraction * total) - allocated))
