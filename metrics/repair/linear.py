"""Replace dropped attention layers by one linear map with bias each (NBL, arXiv 2505.21077).

The map is the linear estimate of least mean square error of what the attention layer gave, from its normed
input: one matrix product for four, no softmax, no KV cache.  What attention mixes in from other tokens is
beyond any such map, however much text it is fitted on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from dropformer.metrics.repair.base import Changes, Foresight, RepairContext
from dropformer.metrics.repair.independent import IndependentRefit, RefitTarget, SlotFit
from dropformer.metrics.repair.slots import OutputProjection
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.loading.skipped_modules import replacement


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


def fit_maps(context: RepairContext) -> Changes:
    """A map for each dropped attention layer.  Time: a dense pass up to the last that no search fitted."""
    return _changes([layer for layer in context.gone if layer.kind == "attn"], context, _fitted(context, context.gone))


def foresee_maps(context: RepairContext, candidates: Sequence[Layer], count: int) -> Foresight:
    """A map for every attention layer among the candidates, from one dense pass."""
    known = _fitted(context, candidates)
    return lambda gone, before: _changes([layer for layer in gone if layer.kind == "attn"], context, known)


Maps = dict[tuple[str, frozenset[Layer]], SlotFit]


def _fitted(context: RepairContext, layers: Iterable[Layer]) -> Maps:
    """Maps for these attention layers, those that are known already left as they are."""
    known: Maps = context.memory.setdefault("linear", {})
    targets = [map_target(context, layer) for layer in layers if layer.kind == "attn"]
    new = [t for t in targets if (t.slot.path, frozenset([t.slot.layer])) not in known]
    groups = [context.groups[batch] for batch in context.fitted_on]
    IndependentRefit(context.runner, context.outputs, context.fitted_on, groups, fits=known).run(new)
    return known


def map_target(context: RepairContext, layer: Layer) -> RefitTarget:
    """The fit of one attention layer's map: its own branch is what is lost, its normed input what is given."""
    forms = linear_forms(context.model, context.architecture, layer, context.runner.start(0).shape[-1])
    path = next(path for path, form in forms.items() if isinstance(form, dict) and "linear" in form)
    reads = next(one for one in _branch_paths(context.architecture, layer) if one in forms)
    taps = context.outputs[layer].taps
    scale = taps[0][1] if len(taps) == 1 else 1.0
    module = replacement(forms[path]).to(context.runner.start(0).dtype)
    return RefitTarget(OutputProjection(layer, path, reads, scale), ((layer,),), ((0,),), module)


def _changes(layers: Sequence[Layer], context: RepairContext, known: Maps) -> Changes:
    tensors: dict[str, Tensor] = {}
    maps: dict[Layer, dict[str, Any]] = {}
    width = context.runner.start(0).shape[-1]
    for layer in layers:
        prefix = context.architecture.block(layer).path + "."
        forms = linear_forms(context.model, context.architecture, layer, width)
        path = next(path for path, form in forms.items() if isinstance(form, dict) and "linear" in form)
        zeros = replacement(forms[path]).to(context.runner.start(0).dtype)
        tensors |= {f"{path}.{name}": p.detach() for name, p in zeros.named_parameters()}
        tensors |= known[path, frozenset([layer])].tensors
        maps[layer] = {name.removeprefix(prefix): form for name, form in forms.items()}
    return Changes(tensors, maps)


def _branch_paths(architecture: Architecture, layer: Layer) -> list[str]:
    """The modules of a layer's branch, in the order in which they run."""
    path = architecture.block(layer).path
    return [f"{path}.{name}" for name in architecture.branches(layer)[0].modules]
