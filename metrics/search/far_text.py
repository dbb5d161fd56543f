"""The cost of rungs at the end of long texts: KL to the dense model on the last tokens, after the dense cache.

The dense model reads each text once.  A candidate then reads only the last tokens, after the dense model's keys and
values, from its first changed block on: a small share of a forward pass, so every layer can be measured alone and
beside others.  The effect of windows on the keys of earlier tokens is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dropformer.metrics.analysis.window_loss import first_output, noting, windowed_twin
from dropformer.metrics.blockwise.divergence import kl_divergence
from dropformer.metrics.search.fold import Constants
from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import attention_module, map_blocks, skipped_modules
from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.parts import continued, empty_cache, replaced
from dropformer.prune.loading.skipped_modules import replacement
from dropformer.prune.loading.window_attention import unfit
from dropformer.prune.outline import Outline
from dropformer.prune.rungs.linear import LinearMap
from dropformer.prune.window import Window

SHARE, LONGEST = 64, 256  # candidates read the last 1/64 of a text, at most 256 tokens
PRICE = 3  # cost of such a token relative to one of a forward pass: it attends to the whole text, with a mask

Action = Window | LinearMap | None
"""A window, a linear map in the layer's place, or None where it is dropped."""

Maps = Callable[[Layer], Mapping[str, nn.Module]]
"""The modules of the model that change where an attention layer becomes a linear map, by path."""


@dataclass(frozen=True)
class Fitted:
    """What actions need beside the model's weights: linear maps, and the constants of folded windows."""

    maps: Maps | None = None
    constants: Constants = field(default_factory=dict)

    def twin(self, module: nn.Module, layer: Layer, window: Window) -> nn.Module:
        """The attention module of the layer with the window."""
        return windowed_twin(module, window, self.constants[layer, window] if window.fold else None)


def tail_of(tokens: int) -> int:
    """Number of tokens at the end of a text that candidates read: 128 of 8,192."""
    return max(2, min(LONGEST, tokens // SHARE))


class Recorded(nn.Module):
    """In place of a block: the dense block's output on the same tokens."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.output


class FarText:
    """The dense model on one long text [T]: its cache, and the outputs of its blocks and head on the tail.

    `damages`: per layer and action, maps apart, on the dense stream of the tail, the mean of |A'(x) - A(x)|^2 / |x|^2.
    Time: a forward pass.  Memory: the KV cache of the text, and log-probabilities [tail, V] in float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        outline: Outline,
        ids: Tensor,
        actions: Sequence[Action],
        fitted: Fitted | None = None,
    ) -> None:
        self.model, self.outline, self.fitted = model, outline, fitted or Fitted()
        self.stack = outline.stacks[0]
        self.blocks = [f"{self.stack.path}.{i}" for i in range(self.stack.blocks)]
        self.outputs: list[Any] = []
        self.damages: dict[Layer, dict[Action, float]] = {}
        self.work = 1.0  # in forward passes over the text
        tail = tail_of(len(ids))
        self.price = PRICE * tail / len(ids)
        ids = ids[None].to(input_device(model))
        self.cache, self.tail = empty_cache(model), ids[:, -tail:]
        with torch.inference_mode():
            model(input_ids=ids[:, :-tail], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            with self._recording(actions):
                self.dense = self._log_probs()

    @property
    def width(self) -> int:
        """The width of the residual stream."""
        return int(first_output(self.outputs[0]).shape[-1])

    def kl(self, actions: Mapping[Layer, Action]) -> float:
        """Mean KL(dense || changed) on the last tokens, in nats.  Time: a pass of the tail from the first change on."""
        first = min(layer.index for layer in actions)
        modules: dict[str, nn.Module] = {
            path: Recorded(output) for path, output in zip(self.blocks[:first], self.outputs, strict=False)
        }
        for layer, action in actions.items():
            modules |= self._changed(layer, action)
        with torch.inference_mode(), replaced(self.model, modules):
            changed = self._log_probs()
        self.work += self.price * (1 - first / len(self.blocks))
        return float(kl_divergence(self.dense, changed).mean())

    def _changed(self, layer: Layer, action: Action) -> Mapping[str, nn.Module]:
        if isinstance(action, LinearMap):
            assert self.fitted.maps is not None
            return self.fitted.maps(layer)
        if action is not None:
            path = f"{self.blocks[layer.index]}.{attention_module(self.outline, layer)}"
            return {path: self.fitted.twin(self.model.get_submodule(path), layer, action)}
        forms = skipped_modules(self.outline, map_blocks(self.outline, [layer], False))
        return {path: replacement(form).keep(self.model.get_submodule(path)) for path, form in forms.items()}

    def _log_probs(self) -> Tensor:
        logits = self.model(input_ids=self.tail, past_key_values=continued(self.cache), use_cache=True).logits[0]
        return logits.float().log_softmax(-1)

    @contextmanager
    def _recording(self, actions: Sequence[Action]) -> Iterator[None]:
        """Inside the `with`, a pass records each block's output, and the damage of each action."""
        with ExitStack() as hooks:
            for index, path in enumerate(self.blocks):
                block = self.model.get_submodule(path)
                layer = Layer("attn", index, self.stack.name)
                hooks.callback(block.register_forward_hook(lambda _m, _a, out: self.outputs.append(out)).remove)
                if self.stack.branch("attn", index) is None:
                    continue
                module = block.get_submodule(attention_module(self.outline, layer))
                if unfit(module):
                    continue
                entered: list[Tensor] = []
                hooks.callback(block.register_forward_pre_hook(noting(entered), with_kwargs=True).remove)
                hook = self._compared(layer, entered, actions)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _compared(self, layer: Layer, entered: list[Tensor], actions: Sequence[Action]) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            full = first_output(output).float()
            size = entered[0].to(full.device).float().square().sum(-1).clamp_min(1e-12)
            found = self.damages.setdefault(layer, {})
            for action in dict.fromkeys([None, *actions]):
                if isinstance(action, LinearMap):
                    continue
                lost = full
                if action is not None:
                    own = {**kwargs, "past_key_values": continued(self.cache)}
                    lost = first_output(self.fitted.twin(module, layer, action)(*args, **own)).float() - full
                found[action] = float((lost.square().sum(-1) / size).mean())

        return hook
