"""What a change costs: KL divergence to the dense model, and perplexity, from the first changed block on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dropformer.metrics.stepping import Stepper
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.modeling import Skipped


def kl_divergence(dense: Tensor, changed: Tensor) -> Tensor:
    """KL(dense || changed) per position, in nats, from log-probabilities in float32.  [..., V] -> [...]."""
    return (dense.exp() * (dense - changed)).sum(-1)


@dataclass(frozen=True)
class Damage:
    """Means over the scored positions, a number for each window [N] in float64."""

    kl: Tensor
    nll: Tensor

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def perplexity(self) -> float:
        return float(self.nll.mean().exp())


class Dense:
    """The unchanged model on fixed windows: what every changed one is compared with.

    Time: one forward pass.  Memory: the stream at every block, (blocks + 1) N T D numbers, and
    log-probabilities in half precision at every `stride`-th position, N T/stride V.  `scored` [B, T] a batch
    says which positions count (None: all).
    """

    def __init__(self, stepper: Stepper, stride: int = 1, scored: list[Tensor | None] | None = None) -> None:
        self.stepper, self.stride = stepper, stride
        self.scored = scored or [None] * len(stepper)
        self.streams: list[list[Tensor]] = []  # batch -> stream that enters each block, and the last
        self._log_probs: list[Tensor] = []
        with torch.inference_mode():
            for batch in range(len(stepper)):
                streams = [stepper.start(batch)]
                for block in range(len(stepper.blocks)):
                    streams.append(stepper.step(block, batch, streams[-1]))
                self.streams.append(streams)
                self._log_probs.append(self._log_probabilities(batch, streams[-1]).half())
            self.damage = self._summary(self._log_probs)

    def compare(self, first: int = 0) -> Damage:
        """The damage of the model as it stands now, whose blocks before `first` are unchanged."""
        with torch.inference_mode():
            found = []
            for batch in range(len(self.stepper)):
                stream = self.stepper.run(first, batch, self.streams[batch][first])
                found.append(self._log_probabilities(batch, stream))
            return self._summary(found)

    def _positions(self, batch: int) -> Tensor:
        start = self.stepper.start(batch)
        return torch.arange(0, start.shape[1] - 1, self.stride, device=start.device)

    def _log_probabilities(self, batch: int, stream: Tensor) -> Tensor:
        return torch.log_softmax(self.stepper.logits(batch, stream, self._positions(batch)).float(), -1)

    def _summary(self, found: list[Tensor]) -> Damage:
        parts = [self._rows(batch, log_probs) for batch, log_probs in enumerate(found)]
        kl, nll = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        return Damage(kl.cpu(), nll.cpu())

    def _rows(self, batch: int, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Per-window means of KL and negative log-likelihood over scored positions, [B] float64."""
        positions, inputs = self._positions(batch), self.stepper.batches[batch]
        labels = inputs["input_ids"][:, positions + 1]
        nll = -log_probs.gather(-1, labels[..., None])[..., 0].double()
        dense = torch.log_softmax(self._log_probs[batch].float(), -1)  # half precision left it off by a constant
        kl = kl_divergence(dense, log_probs).double()
        scored = self.scored[batch]
        weight = torch.ones_like(nll) if scored is None else scored[:, positions.to(scored.device) + 1].to(nll)
        share = weight / weight.sum(1, keepdim=True).clamp_min(1)
        return (kl * share).sum(1), (nll * share).sum(1)


def dropped_modules(architecture: Architecture, layers: Iterable[Layer]) -> dict[str, nn.Module]:
    """Module path -> what stands there once these layers are dropped."""
    return {
        f"{architecture.block(layer).path}.{name}": Skipped(form)
        for layer in layers
        for branch in architecture.branches(layer)
        for name, form in branch.modules.items()
    }


def first_block(layers: Iterable[Layer]) -> int:
    """The first block that dropping these layers changes; 0 where there are none."""
    return min((layer.index for layer in layers), default=0)


def first_changed(stepper: Stepper, paths: Iterable[str]) -> int:
    """The first block that other modules at these paths change; 0 where there are none."""
    blocks = [f"{block.path}." for block in stepper.blocks]
    return min((i for i, block in enumerate(blocks) for path in paths if path.startswith(block)), default=0)
