"""A trace says which operation ran where and what flowed into it."""

import pytest
import torch
from torch import nn

from dropformer.prune.discovery.trace import tracing


class Inner(nn.Module):
    def forward(self, x, *, scale):
        x = x * scale
        return x, None, scale


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        y = self.inner(x, scale=torch.full((4,), 2.0))[0]
        x += y
        return self.norm(x).relu_()


@pytest.fixture
def trace():
    model = Outer()
    with tracing(model) as trace:
        model(torch.ones(2, 3, 4))
    return trace


def test_an_operation_belongs_to_the_innermost_module_that_issued_it(trace):
    scopes = {op.name: op.scope for op in trace.ops}
    assert scopes["aten::mul"] == "inner"
    assert scopes["aten::native_layer_norm"] == "norm"
    assert scopes["aten::add_"] == ""


def test_what_a_module_is_given_and_gives_back_is_told_by_position_and_keyword(trace):
    (call,) = trace.calls_of("inner")
    mul = next(op for op in trace.ops if op.name == "aten::mul")
    assert set(call.inputs) == {0, "scale"}
    assert call.outputs == {0: mul.outputs[0], 2: call.inputs["scale"]}
    assert (call.shape, call.keys, call.passed) == ("tuple", (0, 1, 2), {2: "scale"})


def test_writing_in_place_makes_a_new_value_of_the_same_tensor(trace):
    add = next(op for op in trace.ops if op.name == "aten::add_")
    (inner,), (norm,) = trace.calls_of("inner"), trace.calls_of("norm")
    assert add.outputs[0] != inner.inputs[0]
    assert trace.values[add.outputs[0]] == trace.values[inner.inputs[0]]
    assert norm.inputs[0] == add.outputs[0]


def test_a_view_of_what_was_written_in_place_depends_on_the_write():
    class Model(nn.Module):
        def forward(self, x):
            first = x[:, 0]
            first.mul_(3)
            return x + 1

    model = Model()
    with tracing(model) as trace:
        model(torch.ones(2, 3))
    write = next(op for op in trace.ops if op.name == "aten::mul_")
    read = next(op for op in trace.ops if op.name == "aten::add")
    assert write.outputs[0] in read.inputs


def test_tracing_leaves_no_hook_and_no_gradient_graph_behind():
    model = Outer()
    with tracing(model):
        out = model(torch.ones(2, 3, 4))
    assert not out.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_meta_tensors_are_traced_like_real_ones(trace):
    with torch.device("meta"):
        model = Outer()
        with tracing(model) as meta:
            model(torch.ones(2, 3, 4))
    want = [(op.name, op.scope) for op in trace.ops if op.scope]
    assert [(op.name, op.scope) for op in meta.ops if op.scope] == want
