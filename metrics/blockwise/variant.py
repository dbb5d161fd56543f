"""A pruned and repaired model as replacements of the dense one's modules, made block by block."""

from __future__ import annotations

import copy
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.loading.device import OVERRIDES
from dropformer.prune.loading.skipped_modules import stand_in


@dataclass(frozen=True)
class Changes:
    """What a repair changes in a pruned model.

    `tensors`: new parameters in the model's dtype, by the dense model's names.  `maps`: attention layers replaced by
    linear maps, with module path in the block -> form; a map's parameters are among the tensors under the path of the
    module that it replaces, such as model.layers.5.self_attn.weight.  `unrepaired`: (layer, reason) for each layer
    that could not be repaired.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    maps: Mapping[Layer, Mapping[str, Any]] = field(default_factory=dict)
    unrepaired: tuple[tuple[str, str], ...] = ()

    def __or__(self, other: Changes) -> Changes:
        """Both; the other's tensors take precedence."""
        return Changes(
            {**self.tensors, **other.tensors},
            {**self.maps, **other.maps},
            tuple(dict.fromkeys((*self.unrepaired, *other.unrepaired))),
        )

    def without(self, paths: Collection[str]) -> Changes:
        """These without new parameters of the modules at some paths."""
        left = {name: tensor for name, tensor in self.tensors.items() if name.rpartition(".")[0] not in paths}
        return self if len(left) == len(self.tensors) else replace(self, tensors=left)

    @property
    def empty(self) -> bool:
        return not self.tensors and not self.maps


@dataclass(frozen=True)
class Variant:
    """The dense model without some layers and with some changes.

    `dropped`: path of each removed module -> its output form (`skipped_modules.Skipped`); `mapped`: the same for maps.
    """

    model: nn.Module
    dropped: Mapping[str, Any]
    mapped: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def paths(self) -> set[str]:
        """Paths of the replaced modules."""
        return {*self.dropped, *self.mapped, *(name.rpartition(".")[0] for name in self.tensors)}

    def modules(self, below: str = "") -> dict[str, nn.Module]:
        """The replacements at paths that begin with `below`; unchanged parameters are shared."""
        found: dict[str, nn.Module] = skipped_at(
            self.model, {p: form for p, form in self.dropped.items() if p.startswith(below)}
        )
        for path, form in self.mapped.items():
            if path.startswith(below):
                found[path] = stand_in(self.model.get_submodule(path), form).to(device_of(self.model, path))
        values: dict[str, dict[str, Tensor]] = {}
        inside = tuple(f"{path}." for path in self.dropped)  # a dropped module has no parameters
        for name, tensor in self.tensors.items():
            path, _, leaf = name.rpartition(".")
            if name.startswith(below) and not (path + ".").startswith(inside):
                values.setdefault(path, {})[leaf] = tensor
        for path, new in values.items():
            found[path] = with_parameters_of(found.get(path) or self.model.get_submodule(path), new)
        return found

    def key(self, below: str) -> Hashable:
        """Equal for variants with the same replacements below a path."""
        forms = [(p, repr(form)) for p, form in (*self.dropped.items(), *self.mapped.items()) if p.startswith(below)]
        return frozenset([*forms, *((name, id(t)) for name, t in self.tensors.items() if name.startswith(below))])


def variant(
    model: nn.Module, architecture: Architecture, layers: Iterable[Layer], changes: Changes | None = None
) -> Variant:
    """The model without these layers and with these changes."""
    changes = changes or Changes()
    mapped = {
        f"{architecture.block(layer).path}.{name}": form
        for layer, forms in changes.maps.items()
        for name, form in forms.items()
    }
    dropped = dropped_forms(architecture, [layer for layer in layers if layer not in changes.maps])
    return Variant(model, {p: form for p, form in dropped.items() if p not in mapped}, mapped, changes.tensors)


def skipped_at(model: nn.Module, forms: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Module path -> its replacement once it is dropped."""
    return {path: stand_in(model.get_submodule(path), form) for path, form in forms.items()}


def dropped_forms(architecture: Architecture, layers: Iterable[Layer]) -> dict[str, Any]:
    """Module path -> output form of its replacement once these layers are dropped."""
    return {
        f"{architecture.block(layer).path}.{name}": form
        for layer in layers
        for branch in architecture.branches(layer)
        for name, form in branch.modules.items()
    }


def device_of(model: nn.Module, path: str) -> torch.device:
    """The device of the weights of the module at a path, or of the nearest parent with weights."""
    while True:
        found = next((p.device for p in model.get_submodule(path).parameters() if not p.is_meta), None)
        if found is not None:
            return found
        if not path:
            return torch.device("cpu")
        path = path.rpartition(".")[0]


def with_parameters_of(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A shallow copy of a module with some of its own parameters replaced, without accelerate's hooks."""
    new = copy.copy(module)
    for name in OVERRIDES:
        new.__dict__.pop(name, None)
    device = next((p.device for p in module.parameters() if not p.is_meta), next(iter(values.values())).device)
    new._parameters = {
        name: nn.Parameter(values[name].to(device), requires_grad=False) if name in values else parameter
        for name, parameter in module._parameters.items()
    }
    return new
