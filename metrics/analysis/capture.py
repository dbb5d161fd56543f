"""Score every layer during a forward pass: hooks read the residual stream, sums are all that is kept.

What a layer costs: one difference and its norm, and one norm for each new state of the stream (the end of a block is
the beginning of the next, so its norm is taken once).  Hooks note which states belong together; the numbers are taken
at the end of a block, on a GPU once 64 MiB of states wait: a short text is bound by launches there, and states that
wait together share theirs.  Eight blocks of 512 tokens and 4,096 dimensions need 6 kernels where layer by layer they
need 64.  Cosines are taken of all layers together after the pass.  No state is copied to float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dropformer.metrics.analysis.similarity import cosine, distance, distances, norm, norms, stackable
from dropformer.prune.architecture import Architecture, Block, Branch, Layer, Tap
from dropformer.prune.discovery.proof import on_tap

WAITING = 64 << 20  # bytes of states that may wait on a GPU


class Stream(NamedTuple):
    """The residual stream at one tap, [..., D] in the model's type, and the number of its norm."""

    values: Tensor
    number: int


@dataclass
class Change:
    """What a layer did to every token: the numbers of |before| and |after|, and |after - before| once it is taken.

    The distance is [B, T] in float32, as the norms are.
    """

    before: int
    after: int
    distance: Tensor | None = None


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
        self.clear()

    def clear(self) -> None:
        """Forget what a pass that failed has left."""
        self._found: dict[int, list[Change]] = {}  # column -> a part for each segment, until `take`
        self._norms: list[Tensor | None] = []
        self._held: dict[Tap, Stream] = {}
        self._last: Stream | None = None
        self._forget_waiting()

    def _forget_waiting(self) -> None:
        self._states: list[Stream] = []  # whose norms are not taken yet
        self._pairs: list[tuple[Change, Tensor, Tensor]] = []  # whose distance is not taken yet
        self._bytes, self._here = 0, False  # of these states, and is one of them in the host's memory

    def take(self) -> WindowScores:
        """Sums over the scored tokens since the last call, and how many those were.

        The sum is NaN where a layer did not run.
        """
        self._settle()
        found = {column: self._whole(parts) for column, parts in self._found.items()}
        columns, batch = list(found), len(next(iter(found.values()))[0]) if found else 0
        sums = torch.full((batch, len(self.layers)), torch.nan, dtype=torch.float64)
        tokens = torch.zeros((batch, len(self.layers)), dtype=torch.int64)
        for numbers in stackable([parts[0] for parts in found.values()]):
            group = [columns[number] for number in numbers]
            total, counted = self._sum(cosine(*map(torch.stack, zip(*(found[i] for i in group), strict=True))))
            sums[:, group], tokens[:, group] = total.T.cpu(), counted[:, None].cpu()
        self.clear()
        return WindowScores(sums, tokens)

    def hold(self, tap: Tap, stream: Tensor, inplace: bool = False) -> None:
        """Keep the stream at a tap until its block has ended; a copy if the block writes into it."""
        if self.listening:
            self._held[tap] = self._stream(stream.clone() if inplace else stream)

    def score(self, layer: Layer, before: Tap, stream: Tensor, inplace: bool = False) -> None:
        """Add the similarity of a layer: the stream held at `before` against `stream` after it."""
        if not self.listening:
            return
        x = self._held[before]
        if x.values.device != stream.device:
            x = self._stream(x.values.to(stream.device))
        if inplace:  # its next branch writes into this tensor
            self._add(layer, Change(x.number, self._norm(norm(stream)), distance(x.values, stream)))
            return
        y = self._stream(stream)
        change = Change(x.number, y.number)
        self._pairs.append((change, x.values, y.values))
        self._add(layer, change)

    def score_delta(self, layer: Layer, before: Tap, delta: list[Tensor]) -> None:
        """The same for a parallel branch: after = before + its output."""
        if not self.listening:
            return
        x = self._held[before]
        parts = [d.reshape(x.values.shape).to(x.values.device).float() for d in delta]
        whole = sum(parts[1:], parts[0])
        self._add(layer, Change(x.number, self._norm(norm(x.values + whole)), norm(whole)))

    def release(self, taps: list[Tap]) -> None:
        """Let go of what is held at these taps, at the end of a block."""
        if not self.listening:
            return
        for tap in taps:
            self._held.pop(tap, None)
        if self._here or self._bytes >= WAITING:
            self._settle()

    def _stream(self, tensor: Tensor) -> Stream:
        """The tensor with the number of its norm, which is taken once for what one module hands to the next."""
        if self._last is None or self._last.values is not tensor:
            self._last = Stream(tensor, self._norm(None))
            self._states.append(self._last)
            self._bytes += tensor.nbytes
            self._here |= tensor.device.type == "cpu"
        return self._last

    def _norm(self, values: Tensor | None) -> int:
        """The number under which a norm is kept; None: once it is taken."""
        self._norms.append(values)
        return len(self._norms) - 1

    def _settle(self) -> None:
        """Take the norms and distances that wait, and let go of their states."""
        for stream, found in zip(self._states, norms([stream.values for stream in self._states]), strict=True):
            self._norms[stream.number] = found
        _, before, after = zip(*self._pairs, strict=True) if self._pairs else ((), (), ())
        for (change, *_), found in zip(self._pairs, distances(before, after), strict=True):
            change.distance = found
        self._forget_waiting()

    def _add(self, layer: Layer, change: Change) -> None:
        self._found.setdefault(self._column[layer], []).append(change)

    def _whole(self, changes: list[Change]) -> list[Tensor]:
        """|after - before|, |before| and |after| of a text, of its segments in the order in which the model read them.

        [B, T] each.
        """
        segments = [(c.distance, self._norms[c.before], self._norms[c.after]) for c in changes]
        parts = [[self._batch_first(part) for part in segment if part is not None] for segment in segments]
        return parts[0] if len(parts) == 1 else [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]

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
