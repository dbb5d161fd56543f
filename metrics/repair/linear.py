"""Replace dropped attention layers by one linear map with bias each (NBL, arXiv 2505.21077).

The map is the linear least-squares estimate of the attention layer's output from its normed input: one matrix
product instead of four, no softmax, no KV cache.  It cannot represent what attention mixes in from other tokens,
however much text it is fitted on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from dropformer.metrics.repair.base import Changes, Foresight, RepairContext
from dropformer.metrics.repair.independent import RefitTarget
from dropformer.metrics.repair.refit import Fits, fitted
from dropformer.metrics.repair.slots import OutputProjection
from dropformer.prune.architecture import Architecture, Layer, has_zeros
from dropformer.prune.loading.skipped_modules import replacement

UNMAPPED = "it adds its output to the stream itself, so that no linear map can stand in its place"


def linear_forms(model: nn.Module, architecture: Architecture, layer: Layer, width: int) -> dict[str, Any]:
    """Module path -> form for one attention layer that is replaced by a linear map of width x width.

    The module that writes into the stream (the post-norm if there is one) becomes the map, norms before it stay, and
    the branch's other modules return their input.
    """
    path, modules = architecture.block(layer).path, architecture.branches(layer)[0].modules
    writer = [name for name, form in modules.items() if has_zeros(form)][-1]
    forms: dict[str, Any] = {f"{path}.{writer}": {"linear": [width, width], "of": modules[writer]}}
    for name, form in modules.items():
        if name != writer and not _is_norm(model.get_submodule(f"{path}.{name}"), form):
            forms[f"{path}.{name}"] = _identity(form)
    return forms


def _identity(form: Any) -> Any:
    """The form with the input in place of zeros."""
    if isinstance(form, str):
        return form.replace("zeros", "input")
    if isinstance(form, list):
        return [_identity(part) for part in form]
    return {key: _identity(part) for key, part in form.items()} if isinstance(form, dict) else form


def _is_norm(module: nn.Module, form: Any) -> bool:
    return form == "input" and all(p.ndim <= 1 for p in module.parameters())


def fit_maps(context: RepairContext) -> Changes:
    """A map for each dropped attention layer.  Time: a dense pass up to the last one that no search has fitted."""
    return _changes(context.dropped, context, _fitted(context, context.dropped))


def mappable(architecture: Architecture, layer: Layer) -> bool:
    """Is there a module whose output a map can take the place of?  Not in BLOOM, whose attention adds the stream."""
    return any(has_zeros(form) for form in architecture.branches(layer)[0].modules.values())


def foresee_maps(context: RepairContext, candidates: Sequence[Layer], count: int) -> Foresight:
    """A map for every attention layer among the candidates, from one dense pass."""
    known = _fitted(context, candidates)
    return lambda dropped, before: _changes(dropped, context, known)


def _fitted(context: RepairContext, layers: Iterable[Layer]) -> Fits:
    targets = [map_target(context, layer) for layer in _attention(layers) if mappable(context.architecture, layer)]
    return fitted(context, targets, "linear")


def map_target(context: RepairContext, layer: Layer) -> RefitTarget:
    """The fit of one attention layer's map: from its normed input to its branch's output."""
    forms, path = _map_of(context, layer)
    reads = next(one for one in _branch_paths(context.architecture, layer) if one in forms)
    taps = context.outputs[layer].taps
    scale = taps[0][1] if len(taps) == 1 else 1.0
    module = replacement(forms[path]).to(context.runner.start(0).dtype)
    return RefitTarget(OutputProjection(layer, path, reads, scale), ((layer,),), ((0,),), module)


def _changes(layers: Sequence[Layer], context: RepairContext, known: Fits) -> Changes:
    tensors: dict[str, Tensor] = {}
    maps: dict[Layer, dict[str, Any]] = {}
    unmapped: list[Layer] = []
    for layer in _attention(layers):
        if not mappable(context.architecture, layer):
            unmapped.append(layer)
            continue
        prefix = context.architecture.block(layer).path + "."
        forms, path = _map_of(context, layer)
        zeros = replacement(forms[path]).to(context.runner.start(0).dtype)
        tensors |= {f"{path}.{name}": p.detach() for name, p in zeros.named_parameters()}
        tensors |= known[path, frozenset([layer])].tensors
        maps[layer] = {name.removeprefix(prefix): form for name, form in forms.items()}
    return Changes(tensors, maps, tuple((str(layer), UNMAPPED) for layer in unmapped))


def _attention(layers: Iterable[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.kind == "attn"]


def _map_of(context: RepairContext, layer: Layer) -> tuple[dict[str, Any], str]:
    """The forms of a layer that is replaced by a map, and the path of the map."""
    forms = linear_forms(context.model, context.architecture, layer, context.runner.start(0).shape[-1])
    return forms, next(path for path, form in forms.items() if isinstance(form, dict) and "linear" in form)


def _branch_paths(architecture: Architecture, layer: Layer) -> list[str]:
    """The modules of a layer's branch, in execution order."""
    path = architecture.block(layer).path
    return [f"{path}.{name}" for name in architecture.branches(layer)[0].modules]
