"""Replace dropped attention layers by one linear map with bias each (NBL, arXiv 2505.21077).

The map is the linear estimate of least mean square error of what the attention layer gave, from its normed
input: one matrix product for four, no softmax, no KV cache.  What attention mixes in from other tokens is
beyond any such map, however much text it is fitted on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from dropformer.metrics.repair.projection import OutputProjection
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.loading.modeling import LinearReplacement, replacement


def linear_forms(model: nn.Module, architecture: Architecture, layer: Layer, width: int) -> dict[str, Any]:
    """Module path -> form for one attention layer that becomes a linear map of width x width.

    The module that writes into the stream (a post-norm where there is one) becomes the map; norms before it
    stay; what else the branch owns hands its input on.
    """
    path, modules = architecture.block(layer).path, architecture.branches(layer)[0].modules
    writer = [name for name, form in modules.items() if _writes(form)][-1]
    forms: dict[str, Any] = {f"{path}.{writer}": {"linear": [width, width], "of": modules[writer]}}
    for name, form in modules.items():
        if name != writer and not _is_norm(model.get_submodule(f"{path}.{name}"), form):
            forms[f"{path}.{name}"] = _handing_on(form)
    return forms


def _handing_on(form: Any) -> Any:
    """The form with the hidden states where it had zeros."""
    if isinstance(form, str):
        return form.replace("zeros", "input")
    if isinstance(form, list):
        return [_handing_on(part) for part in form]
    return {key: _handing_on(part) for key, part in form.items()} if isinstance(form, dict) else form


def _writes(form: Any) -> bool:
    """Does the module give what is added to the stream, zeros once it is dropped?"""
    if isinstance(form, str):
        return form.startswith("zeros")
    parts = form.get("list") or form.get("fields", {}).values() if isinstance(form, dict) else form or ()
    return any(_writes(part) for part in parts)


def _is_norm(module: nn.Module, form: Any) -> bool:
    return form == "input" and all(p.ndim <= 1 for p in module.parameters())


def linear_modules(
    model: nn.Module, architecture: Architecture, layers: Iterable[Layer], width: int
) -> tuple[dict[str, nn.Module], list[OutputProjection]]:
    """Stand-ins for attention layers, their maps still zero, and the slots in which to fit them."""
    modules: dict[str, nn.Module] = {}
    slots = []
    like = next(model.parameters())
    for layer in layers:
        forms = linear_forms(model, architecture, layer, width)
        modules |= {path: replacement(form).to(like.device, like.dtype) for path, form in forms.items()}
        reads = next(path for path in _branch_paths(architecture, layer) if path in forms)
        slots += [
            OutputProjection(layer, path, reads) for path in forms if isinstance(modules[path], LinearReplacement)
        ]
    return modules, slots


def _branch_paths(architecture: Architecture, layer: Layer) -> list[str]:
    """The modules of a layer's branch, in the order in which they run."""
    path = architecture.block(layer).path
    return [f"{path}.{name}" for name in architecture.branches(layer)[0].modules]
