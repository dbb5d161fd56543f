"""Run single blocks again on the inputs they had in a forward pass, with some of their modules skipped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache

from dropformer.prune.architecture import Tap
from dropformer.prune.discovery.dataflow import Flow, Term
from dropformer.prune.discovery.trace import outputs_of
from dropformer.prune.loading.device import is_offloaded
from dropformer.prune.loading.parts import evaluating, replaced
from dropformer.prune.loading.skipped_modules import stand_in


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Inside the `with`: evaluation mode, no gradients, and torch's encoder layers without their fused path.

    On the meta device, code that branches on a boolean tensor reads it as true.  Inference mode is left: there
    dispatch modes see whole what is made of other operations, so that no attention is found.
    """
    fused, weightless = torch.backends.mha.get_fastpath_enabled(), _OnMeta() if _on_meta(model) else nullcontext()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), torch.inference_mode(False), torch.no_grad(), weightless:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class _OnMeta(TorchDispatchMode):
    """Lets a model without weights run where it asks whether a mask is all ones, or multiplies experts in any dtype."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "aten::_grouped_mm" and args[0].is_meta:  # torch's own wants bfloat16 there
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def skipped(model: nn.Module, block: str, modules: Mapping[str, Any]) -> Iterator[None]:
    """Inside the `with`, these modules of a block are `Skipped`; the model's own are restored on exit."""
    with replaced(
        model,
        {f"{block}.{name}": stand_in(model.get_submodule(f"{block}.{name}"), form) for name, form in modules.items()},
    ):
        yield


@contextmanager
def reading(model: nn.Module, taps: list[Tap]) -> Iterator[dict[Tap, Tensor]]:
    """Collect what flows past each tap during forward passes inside the `with` (the last value each)."""
    values: dict[Tap, Tensor] = {}
    with ExitStack() as hooks:
        for tap in taps:
            hooks.callback(on_tap(model, tap, lambda tensor, tap=tap: values.__setitem__(tap, tensor.clone())))
        yield values


def on_tap(model: nn.Module, tap: Tap, see: Any) -> Any:
    """Call `see(tensor)` whenever a tensor passes `tap`; returns the function that removes the hook."""
    if tap.like is not None:
        return _on_tap_like(model, tap, see)
    module = model.get_submodule(tap.module)
    if tap.side == "input":

        def before(_m: nn.Module, args: tuple, kwargs: dict) -> None:
            see(picked({**dict(enumerate(args)), **kwargs}, tap.key))

        return module.register_forward_pre_hook(before, with_kwargs=True).remove

    def after(_m: nn.Module, _args: tuple, output: Any) -> None:
        see(picked(outputs_of(output), tap.key))

    return module.register_forward_hook(after).remove


def picked(values: Mapping[Any, Tensor], key: Any) -> Tensor:
    """The value under a tap's key, or those under several keys side by side.  [..., D] or [..., keys x D]"""
    return torch.cat([values[k] for k in key], dim=-1) if isinstance(key, tuple) else values[key]


def _on_tap_like(model: nn.Module, tap: Tap, see: Any) -> Any:
    assert tap.like is not None
    shapes: list[torch.Size] = [torch.Size()]
    hooks = ExitStack()
    hooks.callback(on_tap(model, tap.like, lambda tensor: shapes.__setitem__(0, tensor.shape)))
    hooks.callback(on_tap(model, replace(tap, like=None), lambda tensor: see(tensor.reshape(shapes[0]))))
    return hooks.close


class Replay:
    """The inputs of every block in one forward pass, kept so that a block can run again by itself.

    `seen` has an entry for each call of a block: a model that reads its text in segments calls it several times.
    """

    def __init__(self, model: nn.Module, blocks: list[str], inputs: Mapping[str, Any]) -> None:
        self.model = model
        self.seen: dict[str, list[tuple[tuple, dict]]] = {}
        with ExitStack() as hooks:
            for path in blocks:

                def note(_m: nn.Module, args: tuple, kwargs: dict, path: str = path) -> None:
                    self.seen.setdefault(path, []).append((_copied(args), _copied(kwargs)))

                hook = model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True, prepend=True)
                hooks.callback(hook.remove)
            model(**inputs)

    @property
    def blind(self) -> bool:
        """True for a model without weights, whose tensors hold no numbers."""
        return _on_meta(self.model)

    def run(self, block: str, call: int = 0) -> Any:
        """The block's output on a fresh copy of the inputs of one of its calls."""
        args, kwargs = self.inputs(block, call)
        return self.model.get_submodule(block)(*args, **kwargs)

    def inputs(self, block: str, call: int = 0) -> tuple[tuple, dict]:
        """A fresh copy of the inputs of one of the block's calls."""
        args, kwargs = self.seen[block][call]
        return _copied(args), _copied(kwargs)

    def problem(self, block: str, modules: Mapping[str, Any]) -> str:
        """The error of the block with these modules skipped; "" when it runs."""
        try:
            with skipped(self.model, block, modules):
                for call in range(len(self.seen[block])):
                    self.run(block, call)
        except Exception as error:  # whatever the model's own code raises without a module
            return f"{type(error).__name__}: {error}"
        return ""

    def mixes_tokens(self, flow: Flow, term: Term) -> bool:
        """Does the branch carry anything from one token to another?  Settled by changing one token.

        The module that reads the stream for the branch gets a changed token; the branch mixes when its
        output changes at any other.  Where tensors hold no numbers (meta), the operations tell.
        """
        calls = [call for call in flow.calls if any(call.first <= i < call.last for i in term.ops)]
        first = next(((c, k) for c in calls for k, v in c.inputs.items() if v in term.reads), None)
        last = next(((c, k) for c in calls for k, v in c.outputs.items() if v == term.value), None)
        if first is None or last is None or self.blind:
            # The second is what scaled_dot_product_attention becomes on the meta device, and nothing else.
            mixing = ("scaled_dot_product", "_safe_softmax", "convolution", "cumsum")
            return any(word in flow.ops[i].name for i in term.ops for word in mixing)
        usual = self._output(flow, first, last, 0.0)
        change = (self._output(flow, first, last, 1.0) - usual).abs()
        # Not bit by bit: experts sum a token's numbers in another order when other tokens join it or leave.
        changed = change > (1e-5 if usual.itemsize >= 4 else 1e-2) * usual.abs().max()
        changed[_one_token(changed)] = False
        return bool(changed.any())

    def _output(self, flow: Flow, first: tuple, last: tuple, change: float) -> Tensor:
        """The branch's output with `change` added to one token of its input."""

        def disturb(_m: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            named = {**dict(enumerate(args)), **kwargs}
            named[first[1]] = named[first[1]].clone()
            token = named[first[1]][_one_token(named[first[1]])]
            token += change * torch.arange(token.numel(), device=token.device).view_as(token)  # a norm sees it
            return tuple(named[i] for i in range(len(args))), {k: named[k] for k in kwargs}

        hook = self.model.get_submodule(first[0].path).register_forward_pre_hook(disturb, with_kwargs=True)
        tap = Tap(last[0].path, "output", last[1])
        try:
            with reading(self.model, [tap]) as values:
                self.run(flow.call.path)
        finally:
            hook.remove()
        return values[tap]


def _one_token(tensor: Tensor) -> tuple[int, ...]:
    """The index of one token: tokens stand in two dimensions, of whichever order, or flattened in one."""
    return (0,) * min(2, max(1, tensor.ndim - 1))


def _on_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters()) and not is_offloaded(model)


def _copied(tree: Any) -> Any:
    """Containers rebuilt, tensors and caches cloned: a block may write into what it is given."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if type(tree) in (tuple, list):
        return type(tree)(_copied(item) for item in tree)
    if type(tree) is dict:
        return {key: _copied(item) for key, item in tree.items()}
    cached = isinstance(tree, Cache) or type(tree).__name__.endswith("Cache")  # Reformer's is of no common class
    return copy.deepcopy(tree) if cached else tree
