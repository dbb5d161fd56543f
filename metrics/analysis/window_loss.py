"""What windows, and dropping, take from each attention layer: the ranking behind `window:N@W+S` and `--rungs`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.metrics.analysis.analyze import as_inputs
from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import attention_module
from dropformer.prune.errors import CalibrationError
from dropformer.prune.loading import window_cache
from dropformer.prune.loading.parts import twin_of
from dropformer.prune.loading.skipped_modules import hidden_states
from dropformer.prune.loading.window_attention import CONSTANTS, unfit, window_attention
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
    return {layer: found[window] for layer, found in rung_losses(model, outline, batches, [window], stack).items()}


def rung_losses(
    model: nn.Module,
    outline: Outline,
    batches: Iterable[Mapping[str, Tensor]],
    windows: Sequence[Window],
    stack: str = "",
) -> dict[Layer, dict[Window | None, float]]:
    """`window_losses` for several windows at once, and under None what dropping the layer takes: |A(x)|^2 / |x|^2.

    All at the same positions, those beyond the widest window.  Time: one forward pass, with each attention once more
    a window.
    """
    widest = max(windows, key=lambda window: window.width + window.sinks)
    beyond = widest.width + widest.sinks
    sums: dict[tuple[Layer, Window | None], Tensor] = {}
    counted = 0
    with torch.inference_mode(), _comparing(model, outline, windows, stack, sums):
        for batch in batches:
            length = batch["input_ids"].shape[1]
            if length > beyond:
                counted += len(batch["input_ids"]) * (length - beyond)
                model(**as_inputs(model, batch))
    if not counted:
        raise CalibrationError(
            f"no calibration window is longer than the attention window {widest}; raise --length to about "
            f"{TIMES * widest.width}"
        )
    found: dict[Layer, dict[Window | None, float]] = {}
    for (layer, window), total in sums.items():
        found.setdefault(layer, {})[window] = float(total) / counted
    return found


@contextmanager
def _comparing(
    model: nn.Module,
    outline: Outline,
    windows: Sequence[Window],
    stack: str,
    sums: dict[tuple[Layer, Window | None], Tensor],
) -> Iterator[None]:
    """Inside the `with`, every forward pass adds each layer's losses at positions beyond all windows to `sums`."""
    with ExitStack() as hooks:
        for layer in outline.layers("attn", stack):
            block = model.get_submodule(f"{outline.stack(stack).path}.{layer.index}")
            module = block.get_submodule(attention_module(outline, layer))
            if unfit(module):
                continue
            entered: list[Tensor] = []
            hooks.callback(block.register_forward_pre_hook(noting(entered), with_kwargs=True).remove)
            twins = {window: windowed_twin(module, window) for window in windows}
            compare = _compare(layer, twins, entered, sums)
            hooks.callback(module.register_forward_hook(compare, with_kwargs=True).remove)
        yield


def windowed_twin(module: nn.Module, window: Window, constants: tuple[Tensor, Tensor] | None = None) -> nn.Module:
    """The same attention module with a window: its own settings and hooks, the same weights.

    `constants`: those of a folded window (`metrics.search.fold`); without them its sinks are real, if it has any.
    """
    twin = twin_of(module)
    window_attention(twin, window_cache.Window(window.width, window.sinks), fold=constants is not None)
    for name, tensor in zip(CONSTANTS, constants or (), strict=False):
        getattr(twin, name).data.copy_(tensor)
    return twin


def noting(entered: list[Tensor]) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        entered[:] = [hidden_states(args, kwargs)]

    return hook


def _compare(
    layer: Layer,
    twins: Mapping[Window, nn.Module],
    entered: list[Tensor],
    sums: dict[tuple[Layer, Window | None], Tensor],
) -> Any:
    beyond = slice(max(window.width + window.sinks for window in twins), None)

    def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        full = first_output(output)[:, beyond].float()
        size = entered[0][:, beyond].to(full.device).float().square().sum(-1).clamp_min(1e-12)
        lost: dict[Window | None, Tensor] = {None: full}
        for window, twin in twins.items():
            lost[window] = first_output(twin(*args, **kwargs))[:, beyond].float() - full
        for rung, difference in lost.items():
            total = (difference.square().sum(-1) / size).sum(dtype=torch.float64)
            key = layer, rung  # read once all have passed: the device does not wait
            sums[key] = sums[key] + total if key in sums else total

    return hook


def first_output(result: Any) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result
