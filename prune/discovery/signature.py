"""What a module is, apart from the values of its weights: whether two blocks could stand in each other's place."""

from __future__ import annotations

from typing import Any

from torch import nn


def signature(block: nn.Module) -> dict[str, Any]:
    """For each module of a block, by its path, what `settings` says."""
    return {name: settings(module) for name, module in block.named_modules()}


def settings(module: nn.Module) -> Any:
    """A module's class, its plain settings (its number apart) and its own parameters' shapes."""
    plain = {
        key: value
        for key, value in vars(module).items()
        if key not in ("layer_idx", "training") and not key.startswith("_") and _plain(value)
    }
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    return type(module).__name__, plain, shapes


def _plain(value: Any) -> bool:
    """Is a setting a value, or a collection of values, such as Zamba 2's table of positions?"""
    if isinstance(value, dict):
        return bool(value) and all(_plain(v) for v in (*value, *value.values()))
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_plain, value))
    return isinstance(value, (int, float, str, bool))
