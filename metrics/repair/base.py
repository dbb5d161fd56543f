"""What a repair is, and how it gets into a pruned model and its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dropformer.metrics.blockwise.divergence import DenseReference
from dropformer.metrics.blockwise.runner import replaced
from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import BlockMap, new_index, new_name
from dropformer.prune.outline import Outline


@dataclass(frozen=True)
class Gate:
    """Perplexity on text of another kind than was fitted on, without and with a repair."""

    method: str
    before: float
    after: float

    @property
    def passed(self) -> bool:
        return self.after < self.before

    def __str__(self) -> str:
        verdict = "kept" if self.passed else "not kept"
        return f"{self.method}: perplexity {self.before:.2f} -> {self.after:.2f} on other text, {verdict}"


@dataclass(frozen=True)
class Repair:
    """New values for some parameters of a pruned model, and the attention layers that became linear maps.

    `tensors` go by the dense model's parameter names; a map's are those of the module in whose place it
    stands, such as model.layers.5.self_attn.weight.  No tensor is shared with the dense model.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    mapped: dict[Layer, dict[str, Any]] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()

    def named(self, outline: Outline, block_map: BlockMap) -> dict[str, Tensor]:
        """The tensors by the pruned model's parameter names."""
        maps = {
            f"{outline.stack(layer.stack).path}.{layer.index}.{module}": (layer, module)
            for layer, forms in self.mapped.items()
            for module in forms
        }
        found: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            owner, _, leaf = name.rpartition(".")
            if owner in maps:
                layer, module = maps[owner]
                new = f"{outline.stack(layer.stack).path}.{new_index(block_map, layer)}.{module}.{leaf}"
            else:
                new = new_name(outline, block_map, name) or ""
            if new:
                found[new] = tensor
        return found


def tensors_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters of modules that stand in for a model's own, by parameter name."""
    found: dict[str, Any] = {}
    for path, module in modules.items():
        found |= {f"{path}.{name}": parameter.detach() for name, parameter in module.named_parameters()}
    return found


def gate(
    dense: DenseReference, method: str, without: Mapping[str, nn.Module], with_it: Mapping[str, nn.Module]
) -> Gate:
    """Measure a repair on the windows of `dense`.  Time: two forward passes."""
    found = []
    for modules in (without, with_it):
        with replaced(dense.runner.model, modules):
            found.append(dense.compare(0).perplexity)
    return Gate(method, *found)
