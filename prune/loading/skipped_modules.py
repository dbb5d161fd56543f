"""Modules in place of those that were dropped: they have the output form of the original and do no work.

Self-contained, as `modeling.py` is, and copied beside checkpoints with it.
"""

from __future__ import annotations

from collections import namedtuple
from dis import get_instructions
from functools import cache
from typing import Any

import torch
from torch import nn

from .agent_attention import agent_attention
from .window_attention import window_attention
from .window_cache import Window


class Skipped(nn.Module):
    """In place of a module of a dropped branch: the module's output form, without its computation.

    `form` is "zeros" (zeros like the hidden states: the branch adds nothing), "input" (the hidden states,
    unchanged), either with ":KEY" for the input at that position or keyword and zeros with "/N" for a last
    dimension of N, None, or a list of these for a tuple, {"list": [...]} for a list, {"fields": {...}} for
    named fields.  {"norm": NAME, "of": form} keeps the module's norm of that name and applies it to the inputs
    that are passed on: the norm after a sum that the module adds to itself (XLNet).
    Hidden states: [..., D] -> [..., D].
    """

    batch_first = False  # read by torch's own encoder layers, which then do not take the fused path

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.keeps = form["norm"] if isinstance(form, dict) and "norm" in form else ""
        self.form = form["of"] if self.keeps else form
        # Empty: some blocks ask a norm's weight for its dtype before they call it.
        self.register_buffer("weight", torch.empty(0), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.form, list):
            return tuple(self._value(form, args, kwargs) for form in self.form)
        if isinstance(self.form, dict) and "list" in self.form:
            return [self._value(form, args, kwargs) for form in self.form["list"]]
        if isinstance(self.form, dict):
            fields = {name: self._value(form, args, kwargs) for name, form in self.form["fields"].items()}
            return namedtuple("Dropped", fields)(**fields)
        return self._value(self.form, args, kwargs)

    def _value(self, form: str | None, args: tuple, kwargs: dict) -> Any:
        if form is None:
            return None
        word, _, width = form.partition("/")
        word, _, key = word.partition(":")
        named: Any = (args[int(key)] if key.isdecimal() else kwargs.get(key)) if key else None
        hidden: Any = named if key else hidden_states(args, kwargs)
        if word == "input":
            return getattr(self, self.keeps)(hidden) if self.keeps and hidden is not None else hidden
        return hidden.new_zeros(*hidden.shape[:-1], int(width)) if width else torch.zeros_like(hidden)

    def keep(self, old: nn.Module) -> Skipped:
        """Take over the norm of the module that this one replaces."""
        if self.keeps:
            self.add_module(self.keeps, getattr(old, self.keeps))
        return self

    def extra_repr(self) -> str:
        return repr(self.form)


class LinearReplacement(Skipped):
    """In place of an attention layer: one linear map Wx + b of its hidden states.

    `form` is {"linear": [in, out], "of": the form that `Skipped` would have}; the map's output replaces
    the zeros.  It mixes no tokens and owns no cache entry.  Hidden states: [..., in] -> [..., out].
    """

    def __init__(self, form: dict[str, Any]) -> None:
        super().__init__(form["of"])
        inner, outer = form["linear"]
        del self._buffers["weight"]
        self.weight = nn.Parameter(torch.zeros(outer, inner))
        self.bias = nn.Parameter(torch.zeros(outer))

    def _value(self, form: str | None, args: tuple, kwargs: dict) -> Any:
        if form is None or not form.startswith("zeros"):
            return super()._value(form, args, kwargs)
        return nn.functional.linear(hidden_states(args, kwargs), self.weight, self.bias)


def replacement(form: Any) -> Skipped:
    """The module that a form describes."""
    return LinearReplacement(form) if isinstance(form, dict) and "linear" in form else Skipped(form)


def stand_in(old: nn.Module, form: Any) -> Skipped:
    """The module that a form describes, with the settings and the norm of the one that it replaces."""
    new = replacement(form)
    keep_settings(old, new.keep(old))
    return new


def hidden_states(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden states among a module's inputs: named so, or the first tensor."""
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        return kwargs["hidden_states"]
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


def skip_modules(model: nn.Module, modules: dict[str, Any]) -> None:
    """Replace each named module of `model` by what its form describes: the weights are removed, the settings stay.

    What the trunk of a model with a head did to its own modules already is not done again.
    """
    for path, form in modules.items():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        old = getattr(owner, name)
        if isinstance(old, Skipped) or isinstance(getattr(old, "window", None), Window):
            continue
        if isinstance(form, dict) and "window" in form:
            window_attention(old, Window(*form["window"]), bool(form.get("fold")))
            continue
        if isinstance(form, dict) and "agents" in form:
            agent_attention(old, form["agents"])
            continue
        new = replacement(form)
        if (held := next(old.parameters(), None)) is not None:
            new.to_empty(device=held.device) if new.weight.is_meta else new.to(held.device)
        keep_settings(old, new.keep(old))
        setattr(owner, name, new)
        kind: Any = type(owner)
        for setter in setters(kind):
            if _assigns(getattr(kind, setter), name):
                setattr(owner, setter, ignore)


def keep_settings(old: nn.Module, new: nn.Module) -> None:
    """Copy the attributes that a model reads from its modules or sets in them: attention types, Falcon-H1's vectors."""
    for key, value in vars(old).items():
        if isinstance(value, (int, float, str)) and not key.startswith("_") and not hasattr(new, key):
            setattr(new, key, value)
    for key, buffer in old.named_buffers(recurse=False):
        if key in old._non_persistent_buffers_set and buffer.numel() == max(buffer.shape) and not hasattr(new, key):
            new.register_buffer(key, buffer, persistent=False)
    kind: Any = type(old)
    for setter in setters(kind):
        setattr(new, setter, ignore)


def ignore(*_args: Any, **_kwargs: Any) -> None:
    """In place of a method that would rebuild a dropped module, as BigBird rebuilds its attention by length."""


@cache
def setters(kind: Any) -> list[str]:
    """The methods of a module's class that set something in it."""
    return [name for name in dir(kind) if name.startswith("set_") and not hasattr(nn.Module, name)]


def _assigns(method: Any, attribute: str) -> bool:
    """Does a method assign this attribute of its module?"""
    code = getattr(method, "__code__", None)
    return code is not None and any(
        step.opname == "STORE_ATTR" and step.argval == attribute for step in get_instructions(code)
    )
