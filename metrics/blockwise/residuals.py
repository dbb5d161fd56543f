"""The residual stream before and after every layer, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.prune.architecture import Block, Branch, Layer, Tap
from dropformer.prune.discovery.proof import on_tap


def residual_pairs(runner: BlockRunner) -> Iterator[tuple[int, Layer, Tensor, Tensor]]:
    """(batch, layer, stream before, stream after) for every layer of the model as it is now, block by block.

    Streams are [B, T, D].  Memory: one block's streams of one batch, and the next block's inputs of all batches.
    """
    streams = [runner.start(batch) for batch in range(len(runner))]
    for i in runner.walk():
        block = runner.blocks[i]
        for batch, stream in enumerate(streams):
            with reading_block(runner.model, block) as seen:
                after = runner.step(i, batch, stream)
            for branch in block.branches:
                layer = Layer(branch.kind, block.index, runner.stack.name)
                yield batch, layer, seen[branch.before], after_branch(branch, seen)
            if not block.kept:
                yield batch, Layer("block", block.index, runner.stack.name), stream.to(after.device), after
            streams[batch] = runner.keeper.keep(after)


@contextmanager
def reading_block(model: nn.Module, block: Block) -> Iterator[dict[Tap, Tensor]]:
    """Copies of the tensors at the taps of a block's branches, filled by a pass inside the `with`."""
    seen: dict[Tap, Tensor] = {}
    taps = {tap for b in block.branches for tap in (b.before, b.after, *b.delta) if tap}
    with ExitStack() as hooks:
        for tap in taps:
            hooks.callback(on_tap(model, tap, lambda value, tap=tap: seen.__setitem__(tap, value.clone())))
        yield seen


def after_branch(branch: Branch, seen: dict[Tap, Tensor]) -> Tensor:
    """The stream after a branch: read at its tap, or the stream before it plus the branch's output."""
    if branch.after:
        return seen[branch.after]
    before = seen[branch.before]
    return before + sum(seen[tap].reshape(before.shape) for tap in branch.delta)
