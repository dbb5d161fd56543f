"""Which parameters of a branch write into the residual stream: with these at zero the branch adds exactly zero.

The trace is followed from a branch's output to the parameters that it is made of: through views, sums, norms and
products.

    down_proj(silu(gate_proj(x)) * up_proj(x))      down_proj.weight, and its bias
    gamma * (o_proj(a) + b)                         o_proj.weight and b, not the scale gamma
    sum of w_i * expert_i(x), w from a softmax      every expert's down_proj

Everything else of the branch (queries, norms, scales, routers) may keep its numbers.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from dropformer.prune.architecture import Layer, form_members, has_zeros, norm_of, owns
from dropformer.prune.discovery.dataflow import ADDS, CARRIES, PRODUCTS, SCALES
from dropformer.prune.discovery.replay import traceable
from dropformer.prune.discovery.trace import Call, Op, Trace, tracing
from dropformer.prune.errors import PlanError, reason
from dropformer.prune.outline import Outline
from dropformer.prune.samples.modalities import sample_batches

# What gives zero wherever all of its floating-point inputs are zero.
_MOVES = """cat stack split split_with_sizes unbind chunk index gather index_select embedding repeat copy copy_ t
where index_add index_add_ index_put index_put_ _index_put_impl_ scatter_add scatter_add_ scatter_reduce_ flip sum mean
masked_fill masked_fill_ _unsafe_index _reshape_alias as_strided unfold im2col col2im gelu relu silu tanh neg sub sub_
leaky_relu elu mish hardswish abs relu_ silu_ clamp clamp_ zero_ scatter lift_fresh nan_to_num glu slice_scatter
select_scatter unsqueeze_ squeeze_ transpose_ cumsum max_pool2d avg_pool2d avg_pool1d upsample_nearest1d"""
KEEP_ZERO = CARRIES | ADDS | {f"aten::{name}" for name in _MOVES.split()}
ZEROS = {f"aten::{name}" for name in ("zeros", "zeros_like", "new_zeros")}


def writers(model: nn.Module, outline: Outline, layers: Iterable[Layer]) -> dict[str, str]:
    """The parameters of dropped branches that are to be zero: each of their names in the model -> the first of them.

    `model` may be on the meta device.  Time: a traced pass of a few tokens.  Raises PlanError where zeros in a branch's
    own parameters do not silence it, or would change what stays.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(named)}
    traces, found, dropped = _traces(model), set[str](), set[str]()
    for layer in outline.branch_layers(layers):
        stack = outline.stack(layer.stack)
        path, modules = f"{stack.path}.{layer.index}", stack.modules(layer.kind, layer.index)
        trace = next((trace for trace in traces if trace.calls_of(path)), None)
        if trace is None:
            raise PlanError(f"--format dense: no sample of text or images runs {layer}; use --format dropformer")
        own = {
            name: first[id(p)]
            for name, p in named
            if name.startswith(f"{path}.") and owns(modules, name[len(path) + 1 :])
        }
        new = _Silencer(trace, set(own.values())).silence(path, modules)
        if new is None:
            raise PlanError(f"--format dense: no zeros in its own weights silence {layer}; use --format dropformer")
        found |= new
        dropped |= own.keys()
    silent = {name: first[id(p)] for name, p in named if first[id(p)] in found}
    if kept := sorted(silent.keys() - dropped):
        raise PlanError(f"--format dense: {kept[0]} shares its weights with a dropped layer; use --format dropformer")
    return silent


def _traces(model: nn.Module) -> list[Trace]:
    """A trace for each modality: on the meta device, or on zeros where the model does not run there.

    Raises PlanError where it does neither.
    """
    with suppress(Exception):  # whatever the model's own code raises for tensors without numbers
        return [_traced(model, batch) for batch in sample_batches(model)]
    try:
        blank = _of_zeros(model)
        return [_traced(blank, batch) for batch in sample_batches(blank)]
    except Exception as error:
        raise PlanError(
            f"--format dense has to run the model without its weights, which fails ({reason(error)}); use --format "
            "dropformer"
        ) from None


def _of_zeros(model: nn.Module) -> nn.Module:
    """The model with zeros for weights, in pages that take no memory until they are written to."""
    blank = copy.deepcopy(model)
    for module in blank.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            pages = mmap.mmap(-1, max(1, tensor.numel() * tensor.itemsize))
            zeros = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()) if tensor.numel() else None
            new = torch.empty(tensor.shape, dtype=tensor.dtype) if zeros is None else zeros.view(tensor.shape)
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(new, requires_grad=False)
            else:
                module._buffers[name] = new
    return blank


def _traced(model: nn.Module, batch: Mapping[str, Any]) -> Trace:
    with traceable(model), tracing(model) as trace:
        model(**batch)
    return trace


class _Silencer:
    """Finds the parameters that make values of one trace zero.  `own`: those that may be zeroed."""

    def __init__(self, trace: Trace, own: set[str]) -> None:
        self.trace, self.parameters, self.own = trace, trace.parameters, own
        self.made = {value: i for i, op in enumerate(trace.ops) for value in op.outputs if value not in op.inputs}

    def silence(self, path: str, modules: Mapping[str, Any]) -> set[str] | None:
        """What silences the branch that these modules of a block are; None where nothing does."""
        found: set[str] = set()
        some = False
        for name, form in modules.items():
            norm = f"{path}.{name}.{norm_of(form)}" if norm_of(form) else ""
            for call in self.trace.calls_of(f"{path}.{name}"):
                for value in _silent(call, form):
                    new = self.zero(value)
                    if new is None:
                        return None
                    found, some = found | new, True
                if not has_zeros(form) and (added := self._added(call, norm)) is not None:
                    new = self.zero(added)
                    if new is None:
                        return None
                    found, some = found | new, True
        return found if some else None

    def _added(self, call: Call, norm: str) -> int | None:
        """What a module that adds to the stream itself adds to it; None for any other module."""
        given = set(call.inputs.values())
        for value in call.outputs.values():
            while (op := self._op(value)) and call.first <= self.made[value] < call.last:
                if op.name in ADDS and len(op.inputs) == 2:
                    streams = [v for v in op.inputs if self._carried(v, call) in given]
                    if len(streams) == 1:
                        return next(v for v in op.inputs if v not in streams)
                if op.name not in CARRIES and not (norm and op.scope == norm):
                    break
                value = op.inputs[0]
        return None

    def _carried(self, value: int, call: Call) -> int:
        while (op := self._op(value)) and op.name in CARRIES and self.made[value] >= call.first:
            value = op.inputs[0]
        return value

    def _op(self, value: int) -> Op | None:
        index = self.made.get(value)
        return None if index is None else self.trace.ops[index]

    def zero(self, value: int, depth: int = 0) -> set[str] | None:
        """The parameters that, at zero, make a value zero; None where none do."""
        if value in self.parameters:
            name = self.parameters[value]
            return {name} if name in self.own else None
        op = self._op(value)
        if op is None or depth > 300:
            return None
        floating = [v for v in op.inputs if self.trace.values[v].floating]
        if op.name in ZEROS:
            return set()
        if op.name in PRODUCTS or op.name.endswith(("_mm", "linear")):
            return self._product(op, floating, depth)
        if "norm" in op.name and floating:
            shifts = [v for v in floating[1:] if v in self.parameters][1:]
            return self._all([floating[0], *shifts], depth)
        if op.name in SCALES:
            return self._any(floating[:1] if "div" in op.name else floating, depth)
        if not _keeps_zero(op):
            return None
        if op.name in KEEP_ZERO and floating:
            return self._all(floating, depth)
        return None

    def _product(self, op: Op, floating: list[int], depth: int) -> set[str] | None:
        """A matrix that is a parameter, with the bias that is added to it; else either factor."""
        for value in floating:
            weight = self._parameter(value)
            if weight in self.own and len(self.trace.values[self._base(value)].shape) > 1:
                others = [self._parameter(v) for v in floating if v != value]
                biases = {name for name in others if name in self.own}
                return {weight, *biases} if "conv" in op.name or "addmm" in op.name or not biases else None
        factors = floating[1:] if "add" in op.name else floating
        bias = self._all(floating[:1], depth) if "add" in op.name else set()
        rest = self._any(factors, depth)
        return None if rest is None or bias is None else rest | bias

    def _base(self, value: int) -> int:
        while value not in self.parameters and (op := self._op(value)) and op.name in KEEP_ZERO - ADDS and op.inputs:
            value = op.inputs[0]
        return value

    def _parameter(self, value: int) -> str:
        """The parameter that a value is a view or a part of; "" for none."""
        return self.parameters.get(self._base(value), "")

    def _all(self, values: Iterable[int], depth: int) -> set[str] | None:
        found: set[str] = set()
        for value in values:
            new = self.zero(value, depth + 1)
            if new is None:
                return None
            found |= new
        return found

    def _any(self, values: Iterable[int], depth: int) -> set[str] | None:
        """Zeros in one factor; a scale of its own only where nothing else serves."""
        for value in sorted(values, key=lambda v: bool(self._parameter(v))):
            if (new := self.zero(value, depth + 1)) is not None:
                return new
        return None


def _keeps_zero(op: Op) -> bool:
    """Do the plain numbers of an operation leave zero at zero: no offset, no filling, no bound beyond it?"""
    if op.name in ADDS and len(op.inputs) == 1:
        return not any(op.numbers)
    if "masked_fill" in op.name:
        return not any(op.numbers[-1:])
    if "clamp" in op.name:
        return len(op.numbers) == 2 and op.numbers[0] <= 0 <= op.numbers[1]
    return True


def _silent(call: Call, form: Any) -> Iterator[int]:
    """The outputs of a call that are zeros once its module is dropped."""
    for key, word in form_members(form):
        if str(word).startswith("zeros") and key in call.outputs:
            yield call.outputs[key]
