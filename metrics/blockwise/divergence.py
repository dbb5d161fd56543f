"""What a change costs: KL divergence to the dense model, and perplexity, from the first changed block on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dropformer.metrics.blockwise.runner import BlockRunner, replaced
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.loading.modeling import Skipped


def kl_divergence(dense: Tensor, changed: Tensor) -> Tensor:
    """KL(dense || changed) per position, in nats, from log-probabilities in float32.  [..., V] -> [...]."""
    return (dense.exp() * (dense - changed)).sum(-1)


@dataclass(frozen=True)
class Divergence:
    """Means over the scored positions, a number for each window [N] in float64."""

    kl: Tensor
    nll: Tensor

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def perplexity(self) -> float:
        return float(self.nll.mean().exp())


class DenseReference:
    """The unchanged model on fixed windows: what every changed one is compared with.

    Time: one forward pass.  Memory: the stream at every block, (blocks + 1) N T D numbers, and
    log-probabilities in half precision at every `stride`-th position that counts, N T/stride V.  `scored` [B, T]
    a batch says which tokens count (None: all).
    """

    def __init__(self, runner: BlockRunner, stride: int = 1, scored: list[Tensor | None] | None = None) -> None:
        self.runner, self.stride = runner, stride
        self.scored = scored or [None] * len(runner)
        self.streams: list[list[Tensor]] = []  # batch -> stream that enters each block, and the last
        self._log_probs: list[Tensor] = []
        with torch.inference_mode():
            for batch in range(len(runner)):
                streams = [runner.start(batch)]
                for block in range(len(runner.blocks)):
                    streams.append(runner.step(block, batch, streams[-1]))
                self.streams.append(streams)
                self._log_probs.append(self._log_probabilities(batch, streams[-1]).half())
            self.damage = self._summary(self._log_probs)

    def compare(self, first: int = 0) -> Divergence:
        """The damage of the model as it stands now, whose blocks before `first` are unchanged."""
        with torch.inference_mode():
            found = []
            for batch in range(len(self.runner)):
                stream = self.runner.run(first, batch, self.streams[batch][first])
                found.append(self._log_probabilities(batch, stream))
            return self._summary(found)

    def compare_each(self, changes: Sequence[Mapping[str, nn.Module]]) -> list[Divergence]:
        """The damage of each change by itself, a change being the modules that stand in at some paths.

        Each starts from the dense stream before its first changed block, and changes that look alike in a block
        run it as one batch.  Time: a forward pass of a change's blocks.  Memory: a window's stream and
        log-probabilities for each change.
        """
        if len(changes) > 1 and not self._stacks:
            return [damage for change in changes for damage in self.compare_each([change])]
        with torch.inference_mode():
            found = [self._side_by_side(batch, changes) for batch in range(len(self.runner))]
            return [self._summary([parts[k] for parts in found]) for k in range(len(changes))]

    def _side_by_side(self, batch: int, changes: Sequence[Mapping[str, nn.Module]]) -> list[Tensor]:
        """Log-probabilities of one batch under each change."""
        firsts = [first_changed(self.runner, change) for change in changes]
        streams = [self.streams[batch][first] for first in firsts]
        rows = len(streams[0])
        for block in range(min(firsts), len(self.runner.blocks)):
            groups: dict[frozenset[tuple[str, str | int]], list[int]] = defaultdict(list)
            here = [_within(change, f"{self.runner.blocks[block].path}.") for change in changes]
            for k, first in enumerate(firsts):
                if first <= block:
                    groups[_looks(here[k])].append(k)
            for group in groups.values():
                with replaced(self.runner.model, here[group[0]]):
                    after = self.runner.step(block, batch, _together([streams[k] for k in group]))
                for k, stream in zip(group, after.split(rows), strict=True):
                    streams[k] = stream
        return list(self._log_probabilities(batch, _together(streams)).split(rows))

    @cached_property
    def _stacks(self) -> bool:
        """Do two copies of a stream, run as one batch, give what one gives?  Not where a block counts its rows."""
        dense = self.streams[0][-1]
        exact = 1e-4 if dense.dtype == torch.float32 else 2e-2
        try:
            with torch.inference_mode():
                twice = self.runner.run(0, 0, torch.cat([self.streams[0][0]] * 2))
                logits = self._log_probabilities(0, twice)
        except (RuntimeError, ValueError):
            return False
        apart = max(float((half - dense).norm() / dense.norm()) for half in twice.split(len(dense)))
        return len(logits) == 2 * len(dense) and apart <= exact

    def _positions(self, batch: int) -> Tensor:
        """Every `stride`-th of the positions whose next token counts."""
        start, scored = self.runner.start(batch), self.scored[batch]
        if scored is None:
            return torch.arange(0, start.shape[1] - 1, self.stride, device=start.device)
        return scored[:, 1:].any(0).nonzero()[:: self.stride, 0].to(start.device)

    def _log_probabilities(self, batch: int, stream: Tensor) -> Tensor:
        return torch.log_softmax(self.runner.logits(batch, stream, self._positions(batch)).float(), -1)

    def _summary(self, found: list[Tensor]) -> Divergence:
        parts = [self._rows(batch, log_probs) for batch, log_probs in enumerate(found)]
        kl, nll = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        return Divergence(kl.cpu(), nll.cpu())

    def _rows(self, batch: int, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Per-window means of KL and negative log-likelihood over scored positions, [B] float64."""
        positions, inputs = self._positions(batch), self.runner.batches[batch]
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


def first_changed(runner: BlockRunner, paths: Iterable[str]) -> int:
    """The first block that other modules at these paths change; 0 where there are none."""
    blocks = [f"{block.path}." for block in runner.blocks]
    return min((i for i, block in enumerate(blocks) for path in paths if path.startswith(block)), default=0)


def _together(streams: Sequence[Tensor]) -> Tensor:
    """Streams as one batch, where the first one is: a model may lie on several devices."""
    return torch.cat([stream.to(streams[0].device) for stream in streams])


def _within(change: Mapping[str, nn.Module], prefix: str) -> dict[str, nn.Module]:
    return {path: module for path, module in change.items() if path.startswith(prefix)}


def _looks(modules: Mapping[str, nn.Module]) -> frozenset[tuple[str, str | int]]:
    """What tells stand-ins apart: their form where they have no parameters, else which they are."""
    own = with_parameters(modules)
    return frozenset(
        (path, repr(m) if isinstance(m, Skipped) and path not in own else id(m)) for path, m in modules.items()
    )


def with_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of some modules that have parameters: repairs, not what merely takes a dropped layer's place."""
    return {path: module for path, module in modules.items() if any(True for _ in module.parameters())}
