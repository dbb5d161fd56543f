"""Prove an architecture before it is trusted: drop each branch for a moment and look at the stream."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dropformer.prune.architecture import Architecture, Block, Branch, of_images
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.replay import Replay, on_tap, reading, skipped, traceable
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.outline import Outline
from dropformer.prune.samples.modalities import sample_batches, with_images
from dropformer.prune.spec import parse_spec

__all__ = ["on_tap", "prove", "prove_block"]


def prove(model: nn.Module, architecture: Architecture, inputs: Mapping[str, Tensor] | None = None) -> None:
    """Check every block on tiny forward passes, one for each modality that the model takes unless `inputs` are given;
    nothing of the model is changed afterwards.

    A branch is proven when, with its modules skipped, (1) the block still runs and (2) the stream after
    the branch equals the stream before it, up to constants by which the block scales its own stream.
    Where no module sees the stream after a branch, its contribution must be zero, and (3) all of a plain
    block's contributions must add up to what the block does.
    Raises ArchitectureError with the block and what was seen.
    """
    with traceable(model):
        blocks = [block for stack in architecture.stacks for block in stack.blocks if block.branches]
        for batch in sample_batches(model) if inputs is None else [inputs]:
            replay = Replay(model, [b.path for b in blocks], batch)
            for block in blocks:
                prove_block(replay, block)


def prove_block(replay: Replay, block: Block) -> None:
    """The same for one block, whose inputs `replay` has seen.  Raises ArchitectureError."""
    for call in range(len(replay.seen[block.path])):
        _prove_sum(replay, block, call)
        for branch in block.branches:
            _prove_branch(replay, block, branch, call)


def _prove_branch(replay: Replay, block: Block, branch: Branch, call: int) -> None:
    where = f"block {block.index} ({block.path}), {branch.kind} branch"
    taps = [branch.before, branch.after] if branch.after else [branch.before, *branch.delta]
    try:
        with skipped(replay.model, block.path, branch.modules), reading(replay.model, taps) as values:
            replay.run(block.path, call)
    except Exception as error:  # whatever the model's own code raises without a branch
        raise ArchitectureError(
            f"{where}: the block does not run without it: {type(error).__name__}: {error}"
        ) from error
    if any(tap not in values for tap in taps):
        raise ArchitectureError(f"{where}: the residual stream cannot be read once the branch is dropped")
    if branch.after and not _unchanged(values[branch.before], values[branch.after], branch.scaled):
        raise ArchitectureError(f"{where}: dropping it does not leave the residual stream unchanged")
    if any(values[tap].any() for tap in branch.delta):
        raise ArchitectureError(f"{where}: it still adds something to the residual stream once dropped")


def _prove_sum(replay: Replay, block: Block, call: int) -> None:
    """A plain block whose branches are read by what they add: input + contributions = output."""
    deltas = [tap for branch in block.branches for tap in branch.delta]
    if not block.plain or block.kept or not deltas or any(branch.after for branch in block.branches):
        return
    with reading(replay.model, [block.input, block.output, *deltas]) as values:
        replay.run(block.path, call)
    x, y = values[block.input].double(), values[block.output].double()
    total = x + sum(values[tap].double().reshape(x.shape) for tap in deltas)
    if not _close(total, y, tolerance=_tolerance(values[block.input])):
        raise ArchitectureError(
            f"block {block.index} ({block.path}): its input and its branches do not add up to its output"
        )


def _unchanged(before: Tensor, after: Tensor, scaled: bool) -> bool:
    """Is `after` equal to `before`, or a fixed multiple and offset of it per channel where the block scales?"""
    tolerance = _tolerance(before)
    if before.numel() != after.numel() or before.shape[-1] != after.shape[-1]:
        return False
    x, y = before.double().flatten(0, -2), after.double().flatten(0, -2)
    if not scaled:
        return _close(x, y, tolerance)
    spread = x - x.mean(0)
    slope = (spread * (y - y.mean(0))).sum(0) / spread.square().sum(0).clamp_min(1e-30)
    return bool((slope > 0).all()) and _close(y.mean(0) + slope * spread, y, 10 * tolerance)


def _close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    return bool((x - y).abs().max() <= tolerance * x.abs().max().clamp_min(1e-30))


def _tolerance(tensor: Tensor) -> float:
    """What rounding in the stream's own dtype may cost."""
    return 1e-5 if tensor.itemsize >= 4 else 2e-2


def outline(model: nn.Module, spec: str = "") -> Outline:
    """The proven anatomy of a model, with its vision tower where a drop spec names it.  Raises ArchitectureError."""
    inputs = with_images(model) if any(of_images(s.stack) for s in parse_spec(spec or "attn:1")) else None
    architecture = discover(model, inputs)
    prove(model, architecture, inputs)
    return summarize(model, architecture)
