"""What a window takes from each attention layer: the ranking behind `window:N@W+S`, from one forward pass."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.metrics.analysis.analyze import as_inputs
from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import attention_module
from dropformer.prune.errors import CalibrationError
from dropformer.prune.loading import window_cache
from dropformer.prune.loading.skipped_modules import hidden_states
from dropformer.prune.loading.window_attention import unfit, window_attention
from dropformer.prune.outline import Outline
from dropformer.prune.window import Window

TIMES = 4  # how many windows long the text is: all but a quarter of its positions have something to lose


def window_losses(
    model: nn.Module, outline: Outline, batches: Iterable[Mapping[str, Tensor]], window: Window, stack: str = ""
) -> dict[Layer, float]:
    """Mean over positions beyond the window of |A_w(x) - A(x)|^2 / |x|^2, for each attention layer that takes one.

    A and A_w are the layer's output without and with the window on the dense model's own residual stream x.  On
    SmolLM2 it ranks as the KL divergence does that windowing each layer alone costs (LOG.md), which takes a forward
    pass per layer; this takes one, and each attention twice.  Batches: model inputs [B, T] without padding, T well
    beyond the window.  Raises CalibrationError where none is.
    """
    sums: dict[Layer, float] = {}
    counted = 0
    with torch.inference_mode(), _comparing(model, outline, window, stack, sums):
        for batch in batches:
            length = batch["input_ids"].shape[1]
            if length > window.width + window.sinks:
                counted += len(batch["input_ids"]) * (length - window.width - window.sinks)
                model(**as_inputs(model, batch))
    if not counted:
        raise CalibrationError(
            f"no calibration window is longer than the attention window {window}; raise --length to about "
            f"{TIMES * window.width}"
        )
    return {layer: total / counted for layer, total in sums.items()}


@contextmanager
def _comparing(
    model: nn.Module, outline: Outline, window: Window, stack: str, sums: dict[Layer, float]
) -> Iterator[None]:
    """Inside the `with`, every forward pass adds each layer's loss at positions beyond the window to `sums`."""
    with ExitStack() as hooks:
        for layer in outline.layers("attn", stack):
            block = model.get_submodule(f"{outline.stack(stack).path}.{layer.index}")
            module = block.get_submodule(attention_module(outline, layer))
            if unfit(module):
                continue
            entered: list[Tensor] = []
            hooks.callback(block.register_forward_pre_hook(_note(entered), with_kwargs=True).remove)
            compare = _compare(layer, windowed_twin(module, window), window, entered, sums)
            hooks.callback(module.register_forward_hook(compare, with_kwargs=True).remove)
        yield


def windowed_twin(module: nn.Module, window: Window) -> nn.Module:
    """The same attention module with a window: its own settings and hooks, the same weights."""
    twin = copy.copy(module)
    twin._forward_hooks, twin._forward_pre_hooks = OrderedDict(), OrderedDict()
    twin._forward_pre_hooks_with_kwargs, twin._forward_hooks_with_kwargs = OrderedDict(), OrderedDict()
    window_attention(twin, window_cache.Window(window.width, window.sinks))
    return twin


def _note(entered: list[Tensor]) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        entered[:] = [hidden_states(args, kwargs)]

    return hook


def _compare(layer: Layer, twin: nn.Module, window: Window, entered: list[Tensor], sums: dict[Layer, float]) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        beyond = slice(window.width + window.sinks, None)
        full, seen = (_first(result)[:, beyond].float() for result in (output, twin(*args, **kwargs)))
        stream = entered[0][:, beyond].float()
        lost = (seen - full).square().sum(-1) / stream.square().sum(-1).clamp_min(1e-12)
        sums[layer] = sums.get(layer, 0.0) + float(lost.sum())

    return hook


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result
