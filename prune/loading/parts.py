"""Helpers for any live model: text config, embeddings, caches, evaluation mode, temporarily replaced modules."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dropformer.prune.loading.device import OVERRIDES
from dropformer.prune.loading.window_cache import Window, WindowLayer

GROWING = (DynamicLayer, DynamicSlidingWindowLayer, WindowLayer)


def text_config(owner: Any) -> Any:
    """The config of the text part of a model or of a composite config; its own where all of it is text."""
    config = getattr(owner, "config", owner)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def input_embeddings(model: Any) -> nn.Module | None:
    """The module that turns token ids into vectors; None for a model that has none."""
    try:
        return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except (NotImplementedError, AttributeError):  # models of audio, or of two towers
        return None


def output_embeddings(model: Any) -> nn.Module | None:
    """The module that turns the last hidden states into logits, with a weight [V, D]; None where there is none."""
    try:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    except (NotImplementedError, AttributeError):
        return None
    return head if getattr(head, "weight", None) is not None else None


def windows_of(model: nn.Module) -> dict[str, Window]:
    """Module path -> the window of each attention layer that has one."""
    found: dict[str, Any] = {path: getattr(module, "window", None) for path, module in model.named_modules()}
    return {path: window for path, window in found.items() if hasattr(window, "sinks")}


def empty_cache(model: Any) -> DynamicCache:
    """A cache for a model with the entries that its config asks for, dropped attention layers' empty ones included."""
    return DynamicCache(config=model.config)


def continued(cache: Any) -> Any:
    """A cache that holds what `cache` does and leaves it alone as it grows.

    Entries that make new tensors as they grow are shared until then; others (linear attention, static) are copied.
    """
    if not hasattr(cache, "layers"):
        return copy.deepcopy(cache)
    made = copy.copy(cache)
    made.layers = [copy.copy(e) if type(e) in GROWING else copy.deepcopy(e) for e in cache.layers]
    return made


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, no dropout; the training mode of every module is restored on exit."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the `with`, other modules are at these paths; the model's own are restored on exit."""
    with ExitStack() as undo:
        for path, module in modules.items():
            parent, _, leaf = path.rpartition(".")
            owner = model.get_submodule(parent)
            undo.callback(setattr, owner, leaf, getattr(owner, leaf))
            setattr(owner, leaf, module)
        yield


def shared_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that a model has in several places: tied embeddings, Zamba's shared attention."""
    counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {one for one, count in counts.items() if count > 1}


def twin_of(module: nn.Module) -> Any:
    """A copy of a module with settings and hooks of its own, and the same weights and children."""
    twin = copy.copy(module)
    for name in OVERRIDES:
        twin.__dict__.pop(name, None)
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    twin._forward_pre_hooks_with_kwargs, twin._forward_hooks_with_kwargs = OrderedDict(), OrderedDict()
    return twin


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)
