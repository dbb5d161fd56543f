"""A causal LM as its trunk and its head: hidden states of every token, logits only where they are needed.

A window of 2048 tokens over a vocabulary of 128k is a gigabyte of float32 logits, of which an evaluation
keeps one number per token. So the trunk runs once, and the head runs over bounded pieces of its hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dropformer.prune.loading.device import input_device

LOGIT_BYTES = 128 * 2**20
"""Most bytes of float32 logits held at once."""


class SplitModel:
    """Trunk and head of `model`, proven equal to its own forward when built.

    Between the head's matrix and the logits some families scale or cap (Gemma 2, Cohere, Granite), so three
    ways are tried, fastest first: the output embedding alone; the model's own forward over one token with the
    trunk's result replaced by the hidden states in question; and the whole forward, holding all its logits.
    `how` says which one holds: "embedding", "replay" or "whole".
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.trunk = _trunk(model)
        self.device = input_device(model.get_input_embeddings())
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0]) if _has_head(model) else 0
        self.how = "whole"
        with torch.inference_mode():
            self.how = self._prove()

    def hidden(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The trunk's output for input_ids [B, T]; its `last_hidden_state` is what `logits` takes."""
        if self.how == "whole":
            out = self.model(input_ids=input_ids, **inputs)
            out["last_hidden_state"] = out.logits
            return out
        assert self.trunk is not None  # else "whole"
        return self.trunk(input_ids=input_ids, **inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of hidden states [..., D] -> [..., V], all at once: see `pieces` for many."""
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        if self.how == "embedding":
            out = self.model.get_output_embeddings()(flat)
        elif self.how == "replay":
            out = self._replay(flat)
        else:
            out = flat
        return out.reshape(*hidden.shape[:-1], -1).float()

    def pieces(self, hidden: Tensor) -> Iterator[slice]:
        """Slices of hidden [N, D] whose logits together stay below `LOGIT_BYTES`."""
        width = self.vocabulary or hidden.shape[-1]
        step = max(16, LOGIT_BYTES // (4 * width))
        return (slice(start, start + step) for start in range(0, hidden.shape[0], step))

    def _replay(self, hidden: Tensor) -> Tensor:
        """The model's own way from hidden states to logits, over a trunk pass of one token."""

        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            output["last_hidden_state"] = hidden
            return output

        assert self.trunk is not None
        hook = self.trunk.register_forward_hook(replace)
        try:
            return self.model(input_ids=self._probe()[:, :1], use_cache=False).logits
        finally:
            hook.remove()

    def _prove(self) -> str:
        """The fastest way whose logits are those of the model's own forward."""
        if self.trunk is None or not self.vocabulary:
            return "whole"
        whole = self.model(input_ids=self._probe(), use_cache=False).logits
        try:
            hidden = self.trunk(input_ids=self._probe(), use_cache=False).last_hidden_state
            if not _close(self._replay(hidden), whole):
                return "whole"
            # 100 times larger too: a cap such as 30 tanh(x / 30) cannot be seen on small logits.
            embed = self.model.get_output_embeddings()
            same = all(_close(embed(scale * hidden), self._replay(scale * hidden)) for scale in (1, 100))
        except (TypeError, AttributeError, KeyError, RuntimeError, ValueError):
            return "whole"
        return "embedding" if same else "replay"

    def _probe(self) -> Tensor:
        size = self.model.get_input_embeddings().weight.shape[0]
        return (torch.arange(1, 9, device=self.device) * 7919 % size).unsqueeze(0)


def _has_head(model: PreTrainedModel) -> bool:
    return getattr(model.get_output_embeddings(), "weight", None) is not None


def _trunk(model: PreTrainedModel) -> nn.Module | None:
    trunk = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return trunk if trunk is not model and isinstance(trunk, nn.Module) else None


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal to rounding: 1e-4 of the largest logit in float32, 3e-2 in 16 bits."""
    if one.shape != other.shape:
        return False
    allowed = 1e-4 if one.dtype in (torch.float32, torch.float64) else 3e-2
    left, right = one.float().cpu(), other.float().cpu()
    return bool((left - right).abs().max() <= allowed * right.abs().max())
