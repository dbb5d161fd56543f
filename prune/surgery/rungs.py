"""Checks that the attention layers of a plan support the windows and agents that it gives them, before any change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import attention_path
from dropformer.prune.errors import PlanError
from dropformer.prune.loading import agent_attention, window_attention
from dropformer.prune.loading.parts import evaluating, replaced, twin_of
from dropformer.prune.outline import Outline
from dropformer.prune.rungs.agent import Agents
from dropformer.prune.samples.modalities import sample_batches
from dropformer.prune.window import Window


def check_rungs(outline: Outline, model: nn.Module, rungs: Mapping[Layer, Window | Agents]) -> None:
    """Raises PlanError where an attention module cannot have its window or agents.

    With agents the model is run on a tiny batch of each modality, since masks and biases that agents do not carry show
    only then; on the meta device too.
    """
    paths = {layer: attention_path(outline, layer) for layer in rungs}
    for layer, rung in rungs.items():
        what, fits = ("a window", window_attention) if isinstance(rung, Window) else ("agents", agent_attention)
        if not isinstance(model, PreTrainedModel):
            raise PlanError(f"{layer}: only the attention of a transformers model takes {what}; drop layers instead")
        if reason := fits.unfit(model.get_submodule(paths[layer])):
            raise PlanError(f"{layer}: {reason}; drop it, or leave it as it is")
        folded = isinstance(rung, Window) and rung.fold
        if folded and (reason := window_attention.unfit_constants(model.get_submodule(paths[layer]))):
            raise PlanError(f"{layer}: {reason}; give it a window with sinks, as in window={layer.index}@256+4")
    agents = {paths[layer]: rung.count for layer, rung in rungs.items() if isinstance(rung, Agents)}
    if agents:
        _check_by_running(model, agents)


def _check_by_running(model: Any, agents: Mapping[str, int]) -> None:
    """Raises PlanError where a forward pass shows that an attention does not go through agents."""
    twins = {path: agent_twin(model.get_submodule(path), count) for path, count in agents.items()}
    with torch.no_grad(), evaluating(model), replaced(model, twins):
        for inputs in sample_batches(model):
            try:
                model(**inputs)
            except agent_attention.NoAgents as error:
                raise PlanError(f"{error}; drop such layers, or leave them as they are") from None
            except (NotImplementedError, RuntimeError):
                if not any(p.is_meta for p in model.parameters()):  # where some models ask for values
                    raise


def agent_twin(module: nn.Module, count: int) -> nn.Module:
    """The same attention module with agents, and the same weights."""
    twin = twin_of(module)
    inner = agent_attention.attending(module)
    if inner is not module:
        path = next(name for name, child in module.named_modules() if child is inner)
        _put(twin, path, twin_of(inner) if inner is not None else None)
    agent_attention.agent_attention(twin, count)
    return twin


def _put(twin: Any, path: str, new: Any) -> None:
    """Have a copy hold another module at a path, with copies of those between, so that the original keeps its own."""
    parent, *rest = path.split(".")
    twin._modules = dict(twin._modules)
    if not rest:
        twin._modules[parent] = new
        return
    twin._modules[parent] = twin_of(twin._modules[parent])
    _put(twin._modules[parent], ".".join(rest), new)
