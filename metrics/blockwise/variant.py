"""A changed model beside the dense one: layers dropped, parameters replaced, one block's stand-ins at a time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dropformer.metrics.blockwise.stand_ins import device_of, with_parameters_of
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.loading.skipped_modules import Skipped, replacement


@dataclass(frozen=True)
class Changes:
    """What a repair does to a model that lost layers.

    `tensors`: new values of parameters, in the model's dtype, by the dense model's names.  `maps`: attention layers
    that became linear maps, with module path in the block -> form; the parameters of a map are among the tensors, by
    the path of the module that it replaces, such as model.layers.5.self_attn.weight.  `unrepaired`: each
    layer that the method could not repair, or not refit, and why.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    maps: Mapping[Layer, Mapping[str, Any]] = field(default_factory=dict)
    unrepaired: tuple[tuple[str, str], ...] = ()

    def __or__(self, other: Changes) -> Changes:
        """Both; the other's tensors win."""
        return Changes(
            {**self.tensors, **other.tensors},
            {**self.maps, **other.maps},
            tuple(dict.fromkeys((*self.unrepaired, *other.unrepaired))),
        )

    @property
    def empty(self) -> bool:
        return not self.tensors and not self.maps


@dataclass(frozen=True)
class Variant:
    """The dense model without some layers and with some changes.

    `dropped`: path of each removed module -> its output form (`modeling.Skipped`); `mapped`: the same for maps.
    """

    model: nn.Module
    dropped: Mapping[str, Any]
    mapped: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def paths(self) -> set[str]:
        """The modules that are not the dense model's own."""
        return {*self.dropped, *self.mapped, *(name.rpartition(".")[0] for name in self.tensors)}

    def modules(self, below: str = "") -> dict[str, nn.Module]:
        """The modules at the changed paths that begin with `below`; unchanged parameters are shared."""
        found: dict[str, nn.Module] = skipped_at(
            self.model, {p: form for p, form in self.dropped.items() if p.startswith(below)}
        )
        for path, form in self.mapped.items():
            if path.startswith(below):
                found[path] = replacement(form).to(device_of(self.model, path))
        values: dict[str, dict[str, Tensor]] = {}
        inside = tuple(f"{path}." for path in self.dropped)  # a dropped module holds none of its own any more
        for name, tensor in self.tensors.items():
            path, _, leaf = name.rpartition(".")
            if name.startswith(below) and not (path + ".").startswith(inside):
                values.setdefault(path, {})[leaf] = tensor
        for path, new in values.items():
            found[path] = with_parameters_of(found.get(path) or self.model.get_submodule(path), new)
        return found

    def looks(self, below: str) -> Hashable:
        """Equal for variants that are alike below a path."""
        forms = [(p, repr(form)) for p, form in (*self.dropped.items(), *self.mapped.items()) if p.startswith(below)]
        return frozenset([*forms, *((name, id(t)) for name, t in self.tensors.items() if name.startswith(below))])


def variant(
    model: nn.Module, architecture: Architecture, gone: Iterable[Layer], changes: Changes | None = None
) -> Variant:
    """The model without the dropped layers and with these changes."""
    changes = changes or Changes()
    mapped = {
        f"{architecture.block(layer).path}.{name}": form
        for layer, forms in changes.maps.items()
        for name, form in forms.items()
    }
    dropped = dropped_forms(architecture, [layer for layer in gone if layer not in changes.maps])
    return Variant(model, {p: form for p, form in dropped.items() if p not in mapped}, mapped, changes.tensors)


def skipped_at(model: nn.Module, forms: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Module path -> what takes the module's place once it is dropped."""
    return {path: Skipped(form).keep(model.get_submodule(path)) for path, form in forms.items()}


def dropped_forms(architecture: Architecture, layers: Iterable[Layer]) -> dict[str, Any]:
    """Module path -> output form of its replacement once these layers are dropped."""
    return {
        f"{architecture.block(layer).path}.{name}": form
        for layer in layers
        for branch in architecture.branches(layer)
        for name, form in branch.modules.items()
    }
