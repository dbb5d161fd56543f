"""Constants in place of attention sinks: what the first tokens give a windowed layer, on average.

Far behind the first tokens their keys change little: all that a query takes from them is close to one logit s per query
head and one value c per key-value head.  Both by least squares on the head's output, over queries whose window the
first tokens have left, on the dense model's own stream.  With softmax weight w on the sinks, their mean value u, the
attention o to the window alone and r the log-sum-exp of its logits

    with sinks      (1 - w) o + w u
    with constants  (1 - v) o + v c      v = sigmoid(s - r)

so that c is linear for a given s: s is tried at a few distances from the mean logit of the sinks.
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
DISTANCES = [step / 4 for step in range(-12, 13)]  # of the logits that are tried, in nats
ROUNDS = 8  # of logits and values in turn
SUMS = f"sums of {__name__}"  # the attention implementation that adds up instead of attending

Constants = dict[tuple[Layer, Window], tuple[Tensor, Tensor]]
"""A layer with a folded window -> its `sink_logits` [H] and `sink_values` [H', D]."""


class SinkSums:
    """The sums of the least squares in one layer beyond one window, over queries, in float64.

    For each of the J logits that are tried: squares [J, H], of v; products [J, H, D], of v with t = w u + (v - w) o,
    which v c is to equal; targets [J, H], of |t|^2.
    """

    def __init__(self, module: nn.Module, width: int) -> None:
        (heads,), (self.kv_heads, size) = constant_shapes(module)
        device = next(module.parameters()).device
        self.width, self.queries = width, 0
        self.tried: Tensor | None = None  # [J, H]
        zeros = torch.zeros(len(DISTANCES), heads, size + 2, dtype=torch.float64, device=device)
        self.products, self.squares, self.targets = zeros[..., 2:], zeros[..., 0], zeros[..., 1]

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
            logits = (q @ (key[:, :, None, low:stop].float() * scale).transpose(-1, -2)).masked_fill(~seen, -torch.inf)
            rest, far = logits.logsumexp(-1), q @ sinks.transpose(-1, -2)  # [B, H', G, Q], [B, H', G, Q, S]
            mass = far.logsumexp(-1)
            within = logits.softmax(-1).nan_to_num() @ value[:, :, None, low:stop].float()
            weights = (far - torch.logaddexp(mass, rest)[..., None]).exp()
            given = weights @ value[:, :, None, :SINKS].float()
            self._sum(*(t.flatten(1, 2) for t in (mass, rest, weights.sum(-1), within, given)))
            self.queries += len(query) * (stop - start)

    def _sum(self, mass: Tensor, rest: Tensor, weight: Tensor, within: Tensor, given: Tensor) -> None:
        """[B, H, Q] each, within and given [B, H, Q, D]: o and w u."""
        if self.tried is None:
            self.tried = mass.mean((0, 2)) + mass.new_tensor(DISTANCES)[:, None]
        found = torch.sigmoid(self.tried[:, None, :, None] - rest)  # v, [J, B, H, Q]
        more = found - weight
        self.squares += found.square().sum((1, 3)).double()
        self.products += _over(found, given).double() + _over(found * more, within).double()
        apart = (given * within).sum(-1), within.square().sum(-1)
        targets = given.square().sum(-1) + 2 * more * apart[0] + more.square() * apart[1]
        self.targets += targets.sum((1, 3)).double()

    def constants(self) -> tuple[Tensor, Tensor]:
        """[H] and [H', D], in float32: logits and values in turn, from each head's best value alone."""
        assert self.tried is not None
        least = self.squares.clamp_min(1e-30)
        errors = self.targets - self.products.square().sum(-1) / least
        for _ in range(ROUNDS):
            best = errors.argmin(0)
            squares, products = (_picked(t, best).unflatten(0, (self.kv_heads, -1)) for t in (least, self.products))
            values = products.sum(1) / squares.sum(1)[:, None]  # [H', D]
            c = values.repeat_interleave(len(best) // self.kv_heads, 0)
            errors = self.targets - 2 * (self.products * c).sum(-1) + least * c.square().sum(-1)
        return _picked(self.tried, best).float(), values.float()


def _over(weights: Tensor, states: Tensor) -> Tensor:
    """Sums over queries: [J, B, H, Q], [B, H, Q, D] -> [J, H, D]"""
    return torch.einsum("jbhq,bhqd->jhd", weights, states)


def _picked(sums: Tensor, best: Tensor) -> Tensor:
    """Those of each head's own logit: [J, H, ...], [H] -> [H, ...]"""
    return sums[best, torch.arange(len(best), device=best.device)]


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
