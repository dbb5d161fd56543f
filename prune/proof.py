"""Prove an architecture before it is trusted: drop each branch for a moment and look at the stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.prune.architecture import Architecture, Block, Branch, Tap
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.inputs import sample_inputs
from dropformer.prune.modeling import Skipped
from dropformer.prune.trace import outputs_of


def prove(model: nn.Module, architecture: Architecture, inputs: Mapping[str, Tensor] | None = None) -> None:
    """Check every block on a tiny forward pass; nothing of the model is changed afterwards.

    A branch is proven when (1) with its modules skipped the stream after it equals the stream before
    it, up to a constant factor of the block's own, and (2) the block still runs without it.
    Raises ArchitectureError with the block and what was seen.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _block_inputs(model, architecture) as seen:
            model(**(sample_inputs(model) if inputs is None else inputs))
        for stack in architecture.stacks:
            for block in stack.blocks:
                for branch in block.branches:
                    _prove_branch(model, block, branch, *seen[block.path])
    finally:
        model.train(was_training)


@contextmanager
def _block_inputs(model: nn.Module, architecture: Architecture) -> Iterator[dict[str, tuple[tuple, dict]]]:
    seen: dict[str, tuple[tuple, dict]] = {}
    with ExitStack() as hooks:
        for stack in architecture.stacks:
            for block in stack.blocks:

                def note(_m: nn.Module, args: tuple, kwargs: dict, path: str = block.path) -> None:
                    seen[path] = (_copied(args), _copied(kwargs))

                module = model.get_submodule(block.path)
                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield seen


def _copied(tree: Any) -> Any:
    """Tensors cloned: a block may write into its input."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, tuple):
        return tuple(_copied(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _copied(item) for key, item in tree.items()}
    return tree


def _prove_branch(model: nn.Module, block: Block, branch: Branch, args: tuple, kwargs: dict) -> None:
    where = f"block {block.index} ({block.path}), {branch.kind} branch"
    taps = [branch.before, branch.after] if branch.after else [branch.before, *branch.delta]
    try:
        with torch.no_grad(), skipped(model, block, branch), reading(model, taps) as values:  # type: ignore[arg-type]
            model.get_submodule(block.path)(*_copied(args), **_copied(kwargs))
    except Exception as error:  # whatever the model's own code raises once a branch is gone
        raise ArchitectureError(
            f"{where}: the block does not run without it: {type(error).__name__}: {error}"
        ) from error
    if any(tap not in values for tap in taps):
        raise ArchitectureError(f"{where}: the residual stream cannot be read once the branch is dropped")
    before = values[branch.before].double()
    if branch.after and not _proportional(before, values[branch.after].double()):
        raise ArchitectureError(f"{where}: dropping it does not leave the residual stream unchanged")
    if any(values[tap].any() for tap in branch.delta):
        raise ArchitectureError(f"{where}: it still adds something to the residual stream once dropped")


def _proportional(x: Tensor, y: Tensor) -> bool:
    """Is y = c·x for one positive c?  c is 1 but for blocks that scale their own stream (MiniMax)."""
    if x.numel() != y.numel():
        return False
    x, y = x.flatten(), y.flatten()
    factor = (x @ y) / (x @ x).clamp_min(1e-30)
    return bool(factor > 0) and torch.allclose(y, factor * x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))


@contextmanager
def skipped(model: nn.Module, block: Block, branch: Branch) -> Iterator[None]:
    """Inside the `with`, the branch's modules are `Skipped`; afterwards they are back."""
    with ExitStack() as undo:
        for name, form in branch.modules.items():
            parent, _, leaf = f"{block.path}.{name}".rpartition(".")
            owner = model.get_submodule(parent)
            undo.callback(setattr, owner, leaf, getattr(owner, leaf))
            setattr(owner, leaf, Skipped(form))
        yield


@contextmanager
def reading(model: nn.Module, taps: list[Tap]) -> Iterator[dict[Tap, Tensor]]:
    """Collect what flows past each tap during forward passes inside the `with` (the last value each)."""
    values: dict[Tap, Tensor] = {}
    with ExitStack() as hooks:
        for tap in taps:
            hooks.callback(
                on_tap(model, tap, lambda tensor, tap=tap: values.__setitem__(tap, tensor.clone()))
            )
        yield values


def on_tap(model: nn.Module, tap: Tap, see: Any) -> Any:
    """Call `see(tensor)` whenever a tensor passes `tap`; returns the function that removes the hook."""
    module = model.get_submodule(tap.module)
    if tap.side == "input":

        def before(_m: nn.Module, args: tuple, kwargs: dict) -> None:
            see(args[tap.key] if isinstance(tap.key, int) else kwargs[tap.key])

        return module.register_forward_pre_hook(before, with_kwargs=True).remove

    def after(_m: nn.Module, _args: tuple, output: Any) -> None:
        see(dict(outputs_of(output))[tap.key])

    return module.register_forward_hook(after).remove
