"""Score every layer during a forward pass: hooks read the residual stream, sums are all that is kept.

What a layer costs: one difference and its norm where it ends, and one norm for each new state of the stream (the end
of a block is the beginning of the next, so its norm is taken once).  Cosines are taken of all layers together after
the pass: on a GPU a kernel that is not launched is the cheapest one.  A stream is held from where a layer begins to
where its block ends, no longer, and is never copied to float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dropformer.metrics.analysis.similarity import cosine, distance, norm
from dropformer.prune.architecture import Architecture, Block, Branch, Layer, Tap
from dropformer.prune.discovery.proof import on_tap


@dataclass(frozen=True)
class Stream:
    """The residual stream at one tap, [..., D] in the model's type, and its norm per token, [...] float32."""

    values: Tensor
    norm: Tensor

    def to(self, device: torch.device) -> Stream:
        return self if self.values.device == device else Stream(self.values.to(device), self.norm.to(device))


class Change(NamedTuple):
    """What a layer did to every token: |after - before|, |before| and |after|.  [B, T] float32 each."""

    distance: Tensor
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class WindowScores:
    """One row per window: similarity summed over scored tokens, float64, and how many those are, int64.  [N, layers]"""

    sums: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return self.sums.shape[0]

    def total(self) -> int:
        """Scored tokens of all windows."""
        return int(self.tokens.amax(1).sum()) if len(self) else 0


class Capture:
    """The similarity of every layer, for each window of the forward passes it has seen.

    Set `scored` [B, T] (bool; None: all tokens) or else `batch`, B, before each pass; read `take()` after.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.layers = architecture.layers()
        self.scored: Tensor | None = None
        self.batch: int | None = None
        self.listening = True  # False: forward passes are not looked at
        self._column = {layer: i for i, layer in enumerate(self.layers)}
        self._found: dict[int, list[Change]] = {}  # column -> a part for each segment, until `take`
        self._held: dict[Tap, Stream] = {}
        self._last: Stream | None = None

    def clear(self) -> None:
        """Forget what a pass that failed has left."""
        self._found, self._held, self._last = {}, {}, None

    def take(self) -> WindowScores:
        """Sums over the scored tokens since the last call, and how many those were.

        The sum is NaN where a layer did not run.
        """
        found = {column: self._whole(parts) for column, parts in self._found.items()}
        batch = next(iter(found.values())).distance.shape[0] if found else 0
        sums = torch.full((batch, len(self.layers)), torch.nan, dtype=torch.float64)
        tokens = torch.zeros((batch, len(self.layers)), dtype=torch.int64)
        for columns in _alike(found):
            total, counted = self._sum(cosine(*map(torch.stack, zip(*(found[i] for i in columns), strict=True))))
            sums[:, columns], tokens[:, columns] = total.T.cpu(), counted[:, None].cpu()
        self.clear()
        return WindowScores(sums, tokens)

    def hold(self, tap: Tap, stream: Tensor, inplace: bool = False) -> None:
        """Keep the stream at a tap until its block has ended; a copy if the block writes into it."""
        if self.listening:
            self._held[tap] = self._stream(stream.clone() if inplace else stream, inplace)

    def score(self, layer: Layer, before: Tap, stream: Tensor, inplace: bool = False) -> None:
        """Add the similarity of a layer: the stream held at `before` against `stream` after it."""
        if self.listening:
            x, y = self._held[before].to(stream.device), self._stream(stream, inplace)
            self._add(layer, Change(distance(x.values, y.values), x.norm, y.norm))

    def score_delta(self, layer: Layer, before: Tap, delta: list[Tensor]) -> None:
        """The same for a parallel branch: after = before + its output."""
        if not self.listening:
            return
        x = self._held[before]
        parts = [d.reshape(x.values.shape).to(x.values.device).float() for d in delta]
        whole = sum(parts[1:], parts[0])
        self._add(layer, Change(norm(whole), x.norm, norm(x.values + whole)))

    def release(self, taps: list[Tap]) -> None:
        """Let go of what is held at these taps."""
        if self.listening:
            for tap in taps:
                self._held.pop(tap, None)

    def _stream(self, tensor: Tensor, inplace: bool) -> Stream:
        """The tensor with its norm, which is taken once for a tensor that one module hands to the next."""
        if inplace or self._last is None or self._last.values is not tensor:
            self._last = Stream(tensor, norm(tensor))
        return self._last

    def _add(self, layer: Layer, change: Change) -> None:
        self._found.setdefault(self._column[layer], []).append(change)

    def _whole(self, parts: list[Change]) -> Change:
        """The segments of a text, in the order in which the model read them, as one.  [B, T]"""
        if len(parts) == 1:
            return Change(*map(self._batch_first, parts[0]))
        return Change(*(torch.cat([self._batch_first(p) for p in part], dim=1) for part in zip(*parts, strict=True)))

    def _batch_first(self, part: Tensor) -> Tensor:
        """[B, T] of a stream that runs with its tokens first (XLNet, FSMT) too; others as they are."""
        batch = self.batch if self.scored is None else self.scored.shape[0]
        first = part.ndim != 2 or batch is None or part.shape[0] == batch or part.shape[1] != batch
        return part if first else part.T

    def _sum(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """[layers, B, T], or [layers, B, H, W] for images -> sums [layers, B] in float64 and tokens [B]."""
        flat = similarity.flatten(2) if similarity.ndim > 2 else similarity.unsqueeze(2)
        if self.scored is None or self.scored.numel() != flat[0].numel():
            return flat.sum(2, dtype=torch.float64), torch.full((flat.shape[1],), flat.shape[2])
        scored = self.scored.to(flat.device).reshape(flat.shape[1:])
        kept = torch.where(scored, flat, 0.0)  # not a product: what padding gives may be NaN
        return kept.sum(2, dtype=torch.float64), scored.sum(1)


def _alike(found: Mapping[int, Change]) -> list[list[int]]:
    """Columns whose changes can be stacked: of one shape, on one device."""
    groups: dict[tuple[torch.device, torch.Size], list[int]] = {}
    for column, change in found.items():
        groups.setdefault((change.distance.device, change.distance.shape), []).append(column)
    return list(groups.values())


@contextmanager
def capturing(model: nn.Module, architecture: Architecture) -> Iterator[Capture]:
    """Hooks on every tap inside the `with`, removed on exit.  The model's outputs do not change."""
    capture = Capture(architecture)
    with ExitStack() as hooks:
        for stack in architecture.stacks:
            for block in stack.blocks:
                for remove in _hook_block(model, block, stack.name, capture):
                    hooks.callback(remove)
        yield capture


def _hook_block(model: nn.Module, block: Block, stack: str, capture: Capture) -> Iterator[Any]:
    """Hold where a layer begins, score where it ends; inputs are hooked before outputs of the same module."""
    if not block.branches:
        return  # nothing of it can be dropped, nothing is scored
    befores = list(dict.fromkeys([block.input, *(b.before for b in block.branches)]))
    for tap in befores:
        yield on_tap(model, tap, lambda stream, tap=tap: capture.hold(tap, stream, block.inplace))
    for branch in block.branches:
        layer = Layer(branch.kind, block.index, stack)
        if branch.after:
            yield _score_at(model, branch.after, capture, layer, branch, block)
        else:
            yield from _score_sum(model, branch, capture, layer)
    yield _end(model, block, capture, Layer("block", block.index, stack), befores)


def _score_at(model: nn.Module, tap: Tap, capture: Capture, layer: Layer, branch: Branch, block: Block) -> Any:
    return on_tap(model, tap, lambda stream: capture.score(layer, branch.before, stream, block.inplace))


def _score_sum(model: nn.Module, branch: Branch, capture: Capture, layer: Layer) -> Iterator[Any]:
    parts: list[Tensor] = []

    def see(delta: Tensor) -> None:
        parts.append(delta)
        if len(parts) == len(branch.delta):
            capture.score_delta(layer, branch.before, parts)
            parts.clear()

    for tap in branch.delta:
        yield on_tap(model, tap, see)


def _end(model: nn.Module, block: Block, capture: Capture, layer: Layer, held: list[Tap]) -> Any:
    """Score the block as a whole, unless some of it must stay, and let go of its streams."""

    def see(stream: Tensor) -> None:
        if not block.kept:
            capture.score(layer, block.input, stream, block.inplace)
        capture.release(held)

    return on_tap(model, block.output, see)
