"""What a change costs: KL divergence to the dense model, and perplexity, from the first changed block on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import Variant, dropped_forms, skipped_at
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.loading.parts import replaced

BUSY_CPU, BUSY_GPU = 256, 8192  # tokens in a pass beyond which more variants at once gain nothing


def kl_divergence(dense: Tensor, changed: Tensor) -> Tensor:
    """KL(dense || changed) per position, in nats, from log-probabilities in float32.  [..., V] -> [...]."""
    return (dense.exp() * (dense - changed)).sum(-1)


@dataclass(frozen=True)
class Divergence:
    """Means over the scored positions, one number per window [N] in float64."""

    kl: Tensor
    nll: Tensor

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def perplexity(self) -> float:
        return float(self.nll.mean().exp())


class DenseReference:
    """The dense model on fixed windows: what every changed one is compared with.

    Time: one forward pass.  Memory: the stream at every block, (blocks + 1) N T D numbers, which the runner's keeper
    moves out to files beyond its allowance, and log-probabilities in half precision at every `stride`-th position
    that counts, N T/stride V.  `scored` [B, T] a batch says which tokens count (None: all).
    """

    def __init__(self, runner: BlockRunner, stride: int = 1, scored: list[Tensor | None] | None = None) -> None:
        self.runner, self.stride = runner, stride
        self.scored = scored or [None] * len(runner)
        keep = runner.keeper.keep
        with torch.inference_mode():
            self.streams: list[list[Tensor]] = [[runner.start(batch)] for batch in range(len(runner))]
            for block in runner.walk():  # batch -> stream that enters each block, and the last
                for batch, streams in enumerate(self.streams):
                    streams.append(keep(runner.step(block, batch, streams[-1])))
            self._log_probs = [
                keep(self._log_probabilities(batch, streams[-1]).half()) for batch, streams in enumerate(self.streams)
            ]
            self.divergence = self._summary(self._log_probs)

    def compare(self, first: int = 0) -> Divergence:
        """The divergence of the model in its present state, whose blocks before `first` are unchanged."""
        with torch.inference_mode():
            streams = [self.streams[batch][first] for batch in range(len(self.runner))]
            for block in self.runner.walk(first):
                streams = [self.runner.step(block, batch, stream) for batch, stream in enumerate(streams)]
            return self._summary([self._log_probabilities(batch, stream) for batch, stream in enumerate(streams)])

    def compare_each(self, variants: Sequence[Variant], batches: Sequence[int] | None = None) -> list[Divergence]:
        """The divergence of each variant alone, on some of the batches (None: all).

        All of them pass a block before the next is entered.

        Each starts from the dense stream before its first changed block, and those that look alike in a block run it
        as one batch, up to what keeps the device busy.  Time: a forward pass of a variant's changed blocks.  Memory:
        the windows' stream for each variant, one block's stand-ins, and one window's log-probabilities.
        """
        with torch.inference_mode():
            firsts = [first_changed(self.runner, variant.paths) for variant in variants]
            which = range(len(self.runner)) if batches is None else batches
            streams = [{batch: self.streams[batch][first] for batch in which} for first in firsts]
            for block in self.runner.walk(min(firsts, default=0)):
                self._pass_block(block, variants, [k for k, first in enumerate(firsts) if first <= block], streams)
            found = [[self._rows(b, self._log_probabilities(b, s)) for b, s in parts.items()] for parts in streams]
        return [self._joined(parts) for parts in found]

    def _pass_block(
        self, block: int, variants: Sequence[Variant], which: Sequence[int], streams: list[dict[int, Tensor]]
    ) -> None:
        """Take the streams of some variants through a block."""
        below = f"{self.runner.blocks[block].path}."
        together = {batch: self._together(stream) for batch, stream in streams[which[0]].items()} if which else {}
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for k in which:
            groups[variants[k].looks(below)].append(k)
        for group in groups.values():
            self.runner.provider.enter(self.runner.blocks[block].path)
            with replaced(self.runner.model, variants[group[0]].modules(below)):
                for batch in streams[group[0]]:
                    for some in _parts(group, together[batch]):
                        rows = len(streams[some[0]][batch])
                        after = self.runner.step(block, batch, _joint([streams[k][batch] for k in some]))
                        for k, stream in zip(some, after.split(rows), strict=True):
                            streams[k][batch] = self.runner.keeper.keep(stream)

    def _together(self, stream: Tensor) -> int:
        """How many variants run as one batch."""
        busy = BUSY_CPU if self.runner.start(0).device.type == "cpu" else BUSY_GPU
        most = max(1, busy // stream.shape[:2].numel())
        return most if most == 1 or self._stacks else 1

    @cached_property
    def _stacks(self) -> bool:
        """Do two copies of a stream, run as one batch, give what one gives?  Not where a block counts its rows."""
        dense = self.streams[0][-1]
        exact = 1e-4 if dense.dtype == torch.float32 else 2e-2
        try:
            with torch.inference_mode():
                twice = self.runner.run(0, 0, torch.cat([self.streams[0][0]] * 2))
        except (RuntimeError, ValueError):
            return False
        dense = dense.to(twice.device)
        return max(float((half - dense).norm() / dense.norm()) for half in twice.split(len(dense))) <= exact

    def _positions(self, batch: int) -> Tensor:
        """Every `stride`-th of the positions whose next token counts."""
        start, scored = self.runner.start(batch), self.scored[batch]
        if scored is None:
            return torch.arange(0, start.shape[1] - 1, self.stride, device=start.device)
        return scored[:, 1:].any(0).nonzero()[:: self.stride, 0].to(start.device)

    def _log_probabilities(self, batch: int, stream: Tensor) -> Tensor:
        return torch.log_softmax(self.runner.logits(batch, stream, self._positions(batch)).float(), -1)

    def _summary(self, found: list[Tensor]) -> Divergence:
        return self._joined([self._rows(batch, log_probs) for batch, log_probs in enumerate(found)])

    def _joined(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Divergence:
        kl, nll = (torch.cat([part[i].cpu() for part in parts]) for i in (0, 1))
        return Divergence(kl, nll)

    def _rows(self, batch: int, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Per-window means of KL and negative log-likelihood over scored positions, [B] float64."""
        positions, inputs = self._positions(batch), self.runner.batches[batch]
        labels = inputs["input_ids"][:, positions + 1].to(log_probs.device)
        log_probs = log_probs.float()
        nll = -log_probs.gather(-1, labels[..., None])[..., 0].double()
        dense = self._log_probs[batch].to(log_probs.device)
        dense = torch.log_softmax(dense.float(), -1)  # half precision left it off by a constant
        kl = kl_divergence(dense, log_probs).double()
        scored = self.scored[batch]
        weight = torch.ones_like(nll) if scored is None else scored[:, positions.to(scored.device) + 1].to(nll)
        share = weight / weight.sum(1, keepdim=True).clamp_min(1)
        return (kl * share).sum(1), (nll * share).sum(1)


def dropped_modules(model: nn.Module, architecture: Architecture, layers: Iterable[Layer]) -> dict[str, nn.Module]:
    """Module path -> what takes its place once these layers are dropped."""
    return skipped_at(model, dropped_forms(architecture, layers))


def first_changed(runner: BlockRunner, paths: Iterable[str]) -> int:
    """The first block that other modules at these paths change; 0 where there are none."""
    blocks = [f"{block.path}." for block in runner.blocks]
    return min((i for i, block in enumerate(blocks) for path in paths if path.startswith(block)), default=0)


def _joint(streams: Sequence[Tensor]) -> Tensor:
    """Streams as one batch, where the first one is: a model may lie on several devices."""
    return streams[0] if len(streams) == 1 else torch.cat([stream.to(streams[0].device) for stream in streams])


def _parts(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
