"""The stacks of a model: where its repeated blocks are, what each stack is called, and which blocks are alike."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from dropformer.prune.discovery.dataflow import stream_ends
from dropformer.prune.discovery.trace import Trace
from dropformer.prune.errors import ArchitectureError

SIDE_STACKS = re.compile(r"vision|visual|image|audio|speech", re.I)


def find_stacks(model: nn.Module, trace: Trace) -> list[str]:
    """Paths of the outermost ModuleLists whose every called child maps a tensor to one of its shape."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f + ".") for f in found):
            continue
        calls = [call for i in range(len(module)) for call in trace.calls_of(f"{path}.{i}")]
        if calls and all(_has_parts(model, call.path) and stream_ends(trace, call) for call in calls):
            found.append(path)
    if not found:
        raise ArchitectureError(
            f"{type(model).__name__} has no stack of repeated blocks (a ModuleList whose members keep the shape "
            "of their input); describe its blocks with dropformer.describe"
        )
    return found


def _has_parts(model: nn.Module, path: str) -> bool:
    return next(model.get_submodule(path).children(), None) is not None


def block_paths(model: nn.Module, path: str) -> list[str]:
    try:
        return [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]
    except AttributeError:
        raise ArchitectureError(f"{type(model).__name__} has no module `{path}`") from None


def stack_names(paths: list[str]) -> list[str]:
    """ "" for the only stack, or the only one that is not vision or audio; else the telling path part."""
    main = [path for path in paths if not SIDE_STACKS.search(path)]
    if len(main) == 1:
        return ["" if path in main else _part(path, paths) for path in paths]
    return ["" if len(paths) == 1 else _part(path, paths) for path in paths]


def _part(path: str, paths: list[str]) -> str:
    """The word that tells a stack from the others, or the stretch of its path in which they differ."""
    for word in ("vision", "audio", "encoder", "decoder"):  # a vision tower has an encoder of its own
        if [p for p in paths if word in p] == [path]:
            return word
    split = [p.split(".") for p in paths]
    start = next(i for i in range(len(path)) if len({tuple(p[: i + 1]) for p in split}) > 1)
    end = next(i for i in range(len(path)) if len({tuple(p[len(p) - i - 1 :]) for p in split}) > 1)
    parts = path.split(".")
    start -= parts[start].isdecimal() and start > 0
    return "_".join(parts[start : len(parts) - end]) or "_".join(parts)


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
