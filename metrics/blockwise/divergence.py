"""KL divergence from the dense model, and perplexity, of changed models, run from their first changed block on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dropformer.metrics.blockwise.runner import BlockRunner, not_finite
from dropformer.metrics.blockwise.variant import Variant, dropped_forms, skipped_at
from dropformer.metrics.calibration.batching import busy_tokens
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.errors import ModelError
from dropformer.prune.loading.parts import output_embeddings, replaced

LOGITS = 64 << 20  # bytes of logits that are held at a time


def kl_divergence(dense: Tensor, changed: Tensor) -> Tensor:
    """KL(dense || changed) per position, in nats, from log-probabilities in float32.  [..., V] -> [...].

    A word that the dense model never writes, such as an image's in Chameleon, adds nothing: 0 log 0 is 0.
    """
    shares = dense.exp()
    return torch.where(shares > 0, shares * (dense - changed), 0.0).sum(-1)


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
    """The dense model on fixed windows, the reference of every comparison.

    `scored`: per batch [B, T] bool, the tokens that count (None: all).  Time: one forward pass.  Memory: the residual
    stream at every block, (blocks + 1) N T D numbers, which the runner's keeper moves to files beyond its allowance,
    and log-probabilities in half precision at every `stride`-th scored position, N T/stride V.
    """

    def __init__(self, runner: BlockRunner, stride: int = 1, scored: list[Tensor | None] | None = None) -> None:
        self.runner, self.stride = runner, stride
        self.scored = scored or [None] * len(runner)
        keep = runner.keeper.keep
        with torch.inference_mode():
            self.streams: list[list[Tensor]] = [[runner.start(batch)] for batch in range(len(runner))]
            for block in runner.walk():  # batch -> input stream of each block, and the last output
                for batch, streams in enumerate(self.streams):
                    streams.append(keep(runner.step(block, batch, streams[-1])))
            self._log_probs = [
                keep(torch.cat([part.half() for part in self._log_probabilities(batch, streams[-1])], 1))
                for batch, streams in enumerate(self.streams)
            ]
            known = ((batch, len(self._parts(batch)[0])) for batch in range(len(runner)))
            self.divergence = self._joined([self._rows(b, self._log_probs[b].split(size, 1)) for b, size in known])
        if self.divergence.nll.isnan().any():
            raise ModelError(not_finite(runner.model, runner.start(0).dtype))

    def compare_each(self, variants: Sequence[Variant], batches: Sequence[int] | None = None) -> list[Divergence]:
        """The divergence of each variant, on some of the batches (None: all).

        All variants pass a block before the next one is entered.  Each starts from the dense stream before its first
        changed block; variants with the same replacements in a block run it as one batch, up to what keeps the device
        busy.  Time: per variant a forward pass from its first changed block on.  Memory: one stream per variant, one
        block's replacements, and `LOGITS` bytes of logits a few times over.
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
        """Advance the streams of some variants through a block."""
        below = f"{self.runner.blocks[block].path}."
        together = {batch: self._together(stream) for batch, stream in streams[which[0]].items()} if which else {}
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for k in which:
            groups[variants[k].key(below)].append(k)
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
        """Number of variants that run as one batch."""
        most = max(1, busy_tokens(self.runner.start(0).device) // stream.shape[:2].numel())
        return most if most == 1 or self._batchable else 1

    @cached_property
    def _batchable(self) -> bool:
        """Whether two copies of a stream in one batch give the output of one; some blocks depend on the batch size."""
        dense = self.streams[0][-1]
        exact = 1e-4 if dense.dtype == torch.float32 else 2e-2
        try:
            with torch.inference_mode():
                twice = self.runner.run(0, 0, torch.cat([self.streams[0][0]] * 2))
        except (RuntimeError, ValueError, IndexError):  # the last from XLNet: its second dimension is the batch
            return False
        dense = dense.to(twice.device)
        return max(float((half - dense).norm() / dense.norm()) for half in twice.split(len(dense))) <= exact

    def _positions(self, batch: int) -> Tensor:
        """Every `stride`-th position whose next token is scored, in any of the batch's windows."""
        start, counts = self.runner.start(batch), self._counts(batch)
        if counts is None:
            return torch.arange(0, start.shape[1] - 1, self.stride, device=start.device)
        return counts.any(0).nonzero()[:, 0].to(start.device)

    def _counts(self, batch: int) -> Tensor | None:
        """Which positions count in each window, [B, T - 1] bool; None: the same in all.

        Example, stride 2: of 0 1 1 1 0 1 scored next tokens 0 1 0 1 0 0 count, whatever the batch's other windows have.
        """
        scored = self.scored[batch]
        if scored is None:
            return None
        following = scored[:, 1:]
        return following & ((following.cumsum(1) - 1) % self.stride == 0)

    def _log_probabilities(self, batch: int, stream: Tensor) -> Iterator[Tensor]:
        """In float32 at the scored positions, [B, some, V] at a time."""
        for some in self._parts(batch):
            yield torch.log_softmax(self.runner.logits(batch, stream, some).float(), -1)

    def _parts(self, batch: int) -> Sequence[Tensor]:
        """Positions whose logits are held together."""
        positions, head = self._positions(batch), output_embeddings(self.runner.model)
        if head is None or not self.runner.picks_logits:
            return [positions]
        row = 4 * head.get_parameter("weight").shape[0] * len(self.runner.start(batch))
        return positions.split(max(1, LOGITS // row))

    def _joined(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Divergence:
        kl, nll = (torch.cat([part[i].cpu() for part in parts]) for i in (0, 1))
        return Divergence(kl, nll)

    def _rows(self, batch: int, log_probs: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean KL and negative log-likelihood of each window over its scored positions, [B] float64."""
        found, start = list[tuple[Tensor, Tensor]](), 0
        for part in log_probs:
            found.append(self._errors(batch, slice(start, start + part.shape[1]), part.float()))
            start += part.shape[1]
        kl, nll = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        counts = self._counts(batch)
        weight = torch.ones_like(nll) if counts is None else counts.to(nll)[:, self._positions(batch).to(nll.device)]
        share = weight / weight.sum(1, keepdim=True).clamp_min(1)
        return (kl * share).sum(1), (nll * share).sum(1)

    def _errors(self, batch: int, part: slice, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """KL and negative log-likelihood at some of the scored positions, [B, some] each in float64."""
        labels = self.runner.batches[batch]["input_ids"][:, self._positions(batch)[part] + 1].to(log_probs.device)
        nll = -log_probs.gather(-1, labels[..., None])[..., 0].double()
        dense = self._log_probs[batch][:, part].to(log_probs.device)
        dense = torch.log_softmax(dense.float(), -1)  # renormalized after rounding to half precision
        return kl_divergence(dense, log_probs).double(), nll


def dropped_modules(model: nn.Module, architecture: Architecture, layers: Iterable[Layer]) -> dict[str, nn.Module]:
    """Module path -> its replacement once these layers are dropped."""
    return skipped_at(model, dropped_forms(architecture, layers))


def first_changed(runner: BlockRunner, paths: Iterable[str]) -> int:
    """The first block with a replaced module; 0 if there is none."""
    blocks = [f"{block.path}." for block in runner.blocks]
    return min((i for i, block in enumerate(blocks) for path in paths if path.startswith(block)), default=0)


def _joint(streams: Sequence[Tensor]) -> Tensor:
    """Streams as one batch, on the first one's device."""
    return streams[0] if len(streams) == 1 else torch.cat([stream.to(streams[0].device) for stream in streams])


def _parts(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
