"""Constants in place of attention sinks: what the first tokens give a windowed layer, on average.

Far behind the first tokens their keys change little: all that a query takes from them is close to one logit and one
value per head.  Fitted in closed form on the dense model's own stream, over queries whose window the first tokens have
left: the logit s of a query head is the mean log-sum-exp of its logits for the first S tokens, the value c of a
key-value head the mean of what these gave, weighted by how much of the softmax of sinks and window they took.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dropformer.metrics.analysis.analyze import as_inputs
from dropformer.metrics.analysis.window_loss import windowed_twin
from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import attention_path
from dropformer.prune.errors import CalibrationError, PlanError
from dropformer.prune.loading.window_attention import BAND, CONSTANTS, constant_shapes, unfit, unfit_constants
from dropformer.prune.outline import Outline
from dropformer.prune.window import Window

SINKS = 4  # first tokens that the constants stand for
SUMS = f"sums of {__name__}"  # the attention implementation that adds up instead of attending

Constants = dict[tuple[Layer, Window], tuple[Tensor, Tensor]]
"""A layer with a folded window -> its `sink_logits` [H] and `sink_values` [H', D]."""


class SinkSums:
    """What the sinks gave in one layer beyond one window, summed over queries in float64.

    logits: [H], sums of log-sum-exp; weights: [H'], sums of softmax weight; values: [H', D], of weighted values.
    """

    def __init__(self, module: nn.Module, width: int) -> None:
        (heads,), (kv_heads, size) = constant_shapes(module)
        device = next(module.parameters()).device
        self.width, self.queries = width, 0
        self.logits = torch.zeros(heads, dtype=torch.float64, device=device)
        self.weights = torch.zeros(kv_heads, dtype=torch.float64, device=device)
        self.values = torch.zeros(kv_heads, size, dtype=torch.float64, device=device)

    def add(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Add all queries beyond the window: [B, H, T, D], [B, H', T, D].  Memory: a band of Q x (W + Q) logits."""
        groups, total = query.shape[1] // key.shape[1], query.shape[2]
        sinks = key[:, :, None, :SINKS].float() * scale
        for start in range(self.width, total, BAND):
            stop, low = min(total, start + BAND), max(SINKS, start - self.width + 1)
            q = query[:, :, start:stop].float().unflatten(1, (-1, groups))  # [B, H', G, Q, D]
            slots = torch.arange(start, stop, device=q.device)[:, None]
            near = torch.arange(low, stop, device=q.device)[None]
            seen = (near <= slots) & (near > slots - self.width)
            logits = q @ (key[:, :, None, low:stop].float() * scale).transpose(-1, -2)
            rest = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
            far = q @ sinks.transpose(-1, -2)  # [B, H', G, Q, S]
            mass = far.logsumexp(-1)
            weights = (far - torch.logaddexp(mass, rest)[..., None]).exp()
            given = (weights @ value[:, :, None, :SINKS].float()).sum((0, 2, 3))
            self.logits += mass.sum((0, 3)).flatten().double()
            self.weights += weights.sum((0, 2, 3, 4)).double()
            self.values += given.double()
            self.queries += len(query) * (stop - start)

    def constants(self) -> tuple[Tensor, Tensor]:
        """[H] and [H', D], in float32."""
        values = self.values / self.weights.clamp_min(1e-30)[:, None]
        return (self.logits / self.queries).float(), values.float()


def fit_folds(
    model: nn.Module, outline: Outline, windows: Iterable[tuple[Layer, Window]], batches: Iterable[Mapping[str, Tensor]]
) -> Constants:
    """The constants of these folded windows.  batches: model inputs [B, T] without padding, T beyond the windows.

    Time: one forward pass, with the logits of W + 256 keys a query once more for each window.  Raises CalibrationError
    where no text is longer than the windows, PlanError for a module that takes no constants.
    """
    sums: dict[tuple[Layer, Window], SinkSums] = {}
    with torch.inference_mode(), ExitStack() as hooks:
        for layer, window in windows:
            module = model.get_submodule(attention_path(outline, layer))
            if reason := unfit(module) or unfit_constants(module):
                raise PlanError(f"{layer}: {reason}; give a window with sinks, as in window=3@{window.width}+4")
            sums[layer, window] = SinkSums(module, window.width)
            hook = _summing(_adding(module, window, sums[layer, window]))
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            model(**as_inputs(model, batch))
    if missing := [window for (_, window), found in sums.items() if not found.queries]:
        raise CalibrationError(
            f"no calibration window is longer than the attention window {missing[0]}; raise --length to about "
            f"{4 * missing[0].width}"
        )
    return {place: found.constants() for place, found in sums.items()}


def named_constants(outline: Outline, constants: Constants) -> dict[str, Tensor]:
    """The constants by the names of the parameters that they are going to be."""
    return {
        f"{attention_path(outline, layer)}.{name}": tensor
        for (layer, _), pair in constants.items()
        for name, tensor in zip(CONSTANTS, pair, strict=True)
    }


def _adding(module: nn.Module, window: Window, sums: SinkSums) -> nn.Module:
    """The same attention module, which adds to the sums what passes through the attention interface."""
    twin: Any = windowed_twin(module, Window(window.width))
    twin.config._attn_implementation_internal, twin.sums = SUMS, sums
    return twin


def _summing(twin: nn.Module) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict, _output: Any) -> None:
        twin(*args, **kwargs)

    return hook


def _sum(module: Any, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    scale = kwargs.get("scaling")
    module.sums.add(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(SUMS, _sum)
