"""Score every layer during a forward pass: hooks read the residual stream, sums are all that is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.metrics.similarity import cosine, dot
from dropformer.prune.architecture import Architecture, Block, Branch, Layer, Tap
from dropformer.prune.proof import on_tap


class Capture:
    """Per-window sums of the similarity of every layer, over the forward passes it has seen.

    Set `scored` [B, T] (bool) before each pass; read `take()` after: sums [B, layers] in float64.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.layers = architecture.layers()
        self.scored: Tensor | None = None
        self._column = {layer: i for i, layer in enumerate(self.layers)}
        self._sums: dict[int, Tensor] = {}
        self._held: dict[Tap, tuple[Tensor, Tensor]] = {}  # tap -> (stream, its squared norm)
        self._last: tuple[Tensor, Tensor] | None = None

    def take(self) -> Tensor:
        """Sums over the scored tokens of the last pass, [B, layers] float64 on the CPU; NaN where a layer did not run."""
        rows = next(iter(self._sums.values())).shape[0]
        missing = torch.full((rows,), torch.nan, dtype=torch.float64)
        found = {i: s.to("cpu", torch.float64) for i, s in self._sums.items()}
        self._sums, self._held, self._last = {}, {}, None
        return torch.stack([found.get(i, missing) for i in range(len(self.layers))], dim=1)

    def hold(self, tap: Tap, stream: Tensor, copy: bool = False) -> None:
        """Keep the stream at a tap until the layers that start there have been scored."""
        self._held[tap] = (stream.clone() if copy else stream, self._norm(stream))

    def score(self, layer: Layer, before: Tap, stream: Tensor) -> None:
        """Add the similarity of a layer: the stream held at `before` against `stream` after it."""
        x, xx = self._held[before]
        if x.device != stream.device:
            x, xx = x.to(stream.device), xx.to(stream.device)
        self._add(layer, cosine(dot(x, stream), xx, self._norm(stream)))

    def score_delta(self, layer: Layer, before: Tap, delta: list[Tensor]) -> None:
        """The same for a parallel branch: after = before + its output."""
        x, xx = self._held[before]
        after = x.float() + sum(d.reshape(x.shape).to(x.device).float() for d in delta)
        self._add(layer, cosine(dot(x, after), xx, dot(after, after)))

    def _norm(self, stream: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not stream:  # a block's output is the next one's input
            self._last = (stream, dot(stream, stream))
        return self._last[1]

    def _add(self, layer: Layer, similarity: Tensor) -> None:
        """Sum over scored tokens.  similarity: [B, T], or [B, H, W] for images -> [B]."""
        flat = similarity.reshape(similarity.shape[0], -1).double()
        if self.scored is not None and self.scored.numel() == flat.numel():
            scored = self.scored.to(flat.device).reshape(self.scored.shape[0], -1)
            flat = torch.where(scored, flat.reshape(scored.shape), 0.0)
        self._sums[self._column[layer]] = flat.sum(1)


@contextmanager
def capturing(model: nn.Module, architecture: Architecture) -> Iterator[Capture]:
    """Hooks on every tap inside the `with`, gone on exit.  The model computes what it always does."""
    capture = Capture(architecture)
    with ExitStack() as hooks:
        for stack in architecture.stacks:
            for block in stack.blocks:
                for remove in _hook_block(model, block, stack.name, capture):
                    hooks.callback(remove)
        yield capture


def _hook_block(model: nn.Module, block: Block, stack: str, capture: Capture) -> Iterator[Any]:
    """Hold where a layer begins, score where it ends; inputs are hooked before outputs of the same module."""
    copy = getattr(block, "inplace", False)
    for tap in dict.fromkeys([block.input, *(b.before for b in block.branches)]):
        yield on_tap(model, tap, lambda stream, tap=tap: capture.hold(tap, stream, copy))
    for branch in block.branches:
        layer = Layer(branch.kind, block.index, stack)
        if branch.after:
            yield _score_at(model, branch.after, capture, layer, branch.before)
        else:
            yield from _score_sum(model, branch, capture, layer)
    yield _score_at(model, block.output, capture, Layer("block", block.index, stack), block.input)


def _score_at(model: nn.Module, tap: Tap, capture: Capture, layer: Layer, before: Tap) -> Any:
    return on_tap(model, tap, lambda stream: capture.score(layer, before, stream))


def _score_sum(model: nn.Module, branch: Branch, capture: Capture, layer: Layer) -> Iterator[Any]:
    parts: list[Tensor] = []

    def see(delta: Tensor) -> None:
        parts.append(delta)
        if len(parts) == len(branch.delta):
            capture.score_delta(layer, branch.before, parts)
            parts.clear()

    for tap in branch.delta:
        yield on_tap(model, tap, see)
