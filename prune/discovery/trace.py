"""Watch one forward pass: every tensor operation, the module it ran in, and what flowed where.

The result is a dataflow graph whose values are numbered in the order they appeared.  It works on real
and on meta tensors alike, so a model's structure can be read without its weights.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from dropformer.prune.loading.parts import tensors_in

STATE_NAMES = re.compile(r"^(\w+_)?(state|past|cache)$")  # as parameters of forward; hidden_states are none


@dataclass(frozen=True)
class Op:
    """One operation: its ATen name, the module whose forward issued it, its input and output values.

    `numbers`: plain numbers among its arguments, such as the factor of a product.
    """

    name: str
    scope: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    numbers: tuple[float, ...] = ()


@dataclass
class Call:
    """One call of a module: the values it was given and gave back, and its operations [first, last)."""

    path: str
    first: int
    inputs: dict[int | str, int]
    last: int = 0
    missing: frozenset[int | str | None] = frozenset()  # inputs by position that were None
    outputs: dict[int | str | None, int] = field(default_factory=dict)
    keywords: frozenset[str] = frozenset()  # every keyword it was given, tensors or not
    shape: str = ""  # the output's container: "tensor", "tuple", "list", "fields" or "" for anything else
    keys: tuple[int | str | None, ...] = ()  # the keys of all its members, tensors or not
    passed: dict[int | str | None, int | str] = field(default_factory=dict)  # member -> the input it is, unchanged
    nested: frozenset[int | str | None] = frozenset()  # members that hold tensors in turn: a recurrent state
    state: int | str | None = None  # the input that takes such a state, by the name of the parameter


@dataclass(frozen=True)
class Value:
    """What is known of a tensor that flowed; the tensor itself may be freed, as offloaded weights must be."""

    shape: torch.Size
    floating: bool

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass
class Trace:
    """The operations and the module calls of one forward pass.  `parameters`: those values that are the model's."""

    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)

    @cached_property
    def last_reader(self) -> dict[int, int]:
        """Value -> the last operation that reads it.  For a finished trace."""
        return {value: i for i, op in enumerate(self.ops) for value in op.inputs}

    @cached_property
    def in_place(self) -> list[Op]:
        """The operations that write into a tensor that they are given.  For a finished trace."""
        return [op for op in self.ops if op.name.endswith("_")]

    def calls_of(self, path: str) -> list[Call]:
        return [call for call in self.calls if call.path == path]


class _Recorder(TorchDispatchMode):
    """Numbers tensors by identity; an in-place write gives the tensor, and its storage, a new value."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.scopes: list[str] = []
        self._value: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # id -> its tensor, since ids are used again
        self._written: dict[int, int] = {}  # storage -> the last value written into it in place
        self._held: list[Tensor] = []  # tensors that were written to, so that their storages stay unique

    def value(self, tensor: Tensor) -> int:
        known = self._value.get(id(tensor))
        return known[1] if known and known[0]() is tensor else self._new(tensor)

    def _new(self, tensor: Tensor) -> int:
        number = len(self.trace.values)
        self.trace.values.append(Value(tensor.shape, tensor.is_floating_point()))
        self._value[id(tensor)] = weakref.ref(tensor), number
        return number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = list(tensors_in((args, kwargs)))
        inputs = [self.value(t) for t in read]
        inputs += [self._written[s] for s in map(_storage, read) if s in self._written]
        out = func(*args, **kwargs)
        outputs = []
        in_place = func._schema.is_mutable
        known = {id(t) for t in read}
        for tensor in tensors_in(out):
            outputs.append(self._new(tensor) if id(tensor) not in known or in_place else self.value(tensor))
            if in_place and id(tensor) in known:
                self._written[_storage(tensor)] = outputs[-1]
                self._held.append(tensor)
        scope = self.scopes[-1] if self.scopes else ""
        numbers = tuple(arg for arg in (*args, *kwargs.values()) if type(arg) in (int, float))
        self.trace.ops.append(Op(func._schema.name, scope, tuple(dict.fromkeys(inputs)), tuple(outputs), numbers))
        return out


@contextmanager
def tracing(model: nn.Module) -> Iterator[Trace]:
    """Record every forward pass of `model` inside the `with`, without gradients.

    Modules are named as in `model.named_modules()`.  Hooks are removed on exit.
    """
    recorder = _Recorder()
    recorder.trace.parameters = {recorder.value(parameter): name for name, parameter in model.named_parameters()}
    with ExitStack() as stack:
        for path, module in model.named_modules():
            for handle in _hook(module, path, recorder):
                stack.callback(handle.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        yield recorder.trace


def _hook(module: nn.Module, path: str, recorder: _Recorder) -> Iterator[RemovableHandle]:
    open_calls: list[Call] = []
    given: list[dict[int | str, Any]] = []

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = {**dict(enumerate(args)), **kwargs}
        inputs = {key: recorder.value(value) for key, value in named.items() if isinstance(value, Tensor)}
        missing = frozenset(key for key, value in enumerate(args) if value is None)
        open_calls.append(Call(path, len(recorder.trace.ops), inputs, missing=missing, keywords=frozenset(kwargs)))
        given.append(named)
        recorder.trace.calls.append(open_calls[-1])
        recorder.scopes.append(path)

    def after(_module: nn.Module, _args: tuple, output: Any) -> None:
        call = open_calls.pop()
        recorder.scopes.pop()
        call.last = len(recorder.trace.ops)
        members, named = members_of(output), given.pop()
        call.shape, call.keys = shape_of(output), tuple(members)
        call.outputs = {key: recorder.value(item) for key, item in members.items() if isinstance(item, Tensor)}
        same = {id(value): key for key, value in named.items() if isinstance(value, (Tensor, list, dict))}
        call.passed = {key: same[id(item)] for key, item in members.items() if id(item) in same}
        call.nested = frozenset(key for key, item in members.items() if _holds_tensors(item))
        call.state = _state_input(module, named) if call.nested else None

    # First before, last after: what other hooks do (accelerate placing weights) happens inside the call.
    yield module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    yield module.register_forward_hook(after)


def members_of(output: Any) -> dict[int | str | None, Any]:
    """The parts of a module's output under the key that picks each: None, an index or a field."""
    if isinstance(output, tuple) and (fields := getattr(output, "_fields", None)):
        return dict(zip(fields, output, strict=True))
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    if isinstance(output, dict):
        return dict(output)
    if dataclasses.is_dataclass(output):
        return {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    return {None: output}


def outputs_of(output: Any) -> dict[int | str | None, Tensor]:
    """The tensors of a module's output, by key."""
    return {key: item for key, item in members_of(output).items() if isinstance(item, Tensor)}


def shape_of(output: Any) -> str:
    """How a module's output holds its tensors: "tensor", "tuple", "list", "fields", or "" for anything else."""
    if isinstance(output, Tensor):
        return "tensor"
    if isinstance(output, dict) or hasattr(output, "_fields") or dataclasses.is_dataclass(output):
        return "fields"
    return "tuple" if type(output) is tuple else "list" if type(output) is list else ""


def _holds_tensors(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and any(isinstance(part, Tensor) for part in item)


def _state_input(module: nn.Module, named: dict[int | str, Any]) -> int | str | None:
    """The only input, given as such or as None, whose parameter is named as a state; None where there is no such."""
    names = list(inspect.signature(module.forward).parameters)
    called = {key: names[key] if isinstance(key, int) and key < len(names) else str(key) for key in named}
    found = [key for key, name in called.items() if STATE_NAMES.search(name)]
    held = [key for key in found if named[key] is None or _holds_tensors(named[key])]
    return held[0] if len(held) == 1 else None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
