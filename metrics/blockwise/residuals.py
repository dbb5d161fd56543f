"""The residual stream before and after every layer, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.prune.architecture import Block, Branch, Layer, Tap
from dropformer.prune.discovery.proof import on_tap


def residual_pairs(
    runner: BlockRunner, batch: int, first: int = 0, stream: Tensor | None = None
) -> Iterator[tuple[Layer, Tensor, Tensor]]:
    """(layer, stream before, stream after) for every layer from block `first` on, the model as it stands now.

    Streams are [B, T, D]; `stream` is the one that enters block `first`.  Holds one block's streams at a time.
    """
    stream = runner.start(batch) if stream is None else stream
    for i in range(first, len(runner.blocks)):
        block = runner.blocks[i]
        with reading_block(runner.model, block) as seen:
            after = runner.step(i, batch, stream)
        for branch in block.branches:
            yield Layer(branch.kind, block.index, runner.stack.name), seen[branch.before], after_branch(branch, seen)
        if not block.kept:
            yield Layer("block", block.index, runner.stack.name), stream, after
        stream = after


@contextmanager
def reading_block(model: nn.Module, block: Block) -> Iterator[dict[Tap, Tensor]]:
    """What flows past the taps of a block's branches, copied, during a pass inside the `with`."""
    seen: dict[Tap, Tensor] = {}
    taps = {tap for b in block.branches for tap in (b.before, b.after, *b.delta) if tap}
    with ExitStack() as hooks:
        for tap in taps:
            hooks.callback(on_tap(model, tap, lambda value, tap=tap: seen.__setitem__(tap, value.clone())))
        yield seen


def after_branch(branch: Branch, seen: dict[Tap, Tensor]) -> Tensor:
    """The stream after a branch: read there, or the stream before it and what the branch adds."""
    if branch.after:
        return seen[branch.after]
    before = seen[branch.before]
    return before + sum(seen[tap].reshape(before.shape) for tap in branch.delta)
