"""Budgets are read, met, and met without waste."""

import pytest

from dropformer import api
from dropformer.metrics.search.budget import Budget, Latency, meter, parse_budget, within
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import PlanError


@pytest.fixture
def outline(tiny):
    return api.outline(tiny("llama"))


def candidates(outline):
    return [*outline.layers("attn"), *outline.layers("mlp")]


def by_depth(layers):
    """A damage that grows with depth, more for MLPs."""
    return sum((1 + layer.index) * (3 if layer.kind == "mlp" else 1) for layer in layers)


@pytest.mark.parametrize("text", ["kv:-25%", "params:-20%", "decode:1.3x", "params:-12.5%", "measured:1.25x"])
def test_a_budget_prints_as_it_was_written(text):
    assert str(parse_budget(text)) == text


@pytest.mark.parametrize("text", ["", "kv:25%", "kv:-0%", "params:-100%", "decode:1x", "decode:0.5x", "memory:-3%"])
def test_a_budget_that_cannot_be_read_says_what_was_expected(text):
    with pytest.raises(PlanError, match="expected kv:-25%"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["kv:-25%", "kv:-50%", "params:-20%", "params:-40%", "decode:1.3x"])
def test_every_budget_is_met(outline, text):
    budget = parse_budget(text)
    goal = meter(budget, outline, candidates(outline))
    layers = within(goal, candidates(outline), by_depth).layers
    before, after = outline.parameters, outline.parameters - outline.dropped_parameters(layers)
    kv_before, kv_after = outline.kv_per_token(), outline.kv_per_token(layers)
    saved = {
        "kv": 1 - kv_after / kv_before,
        "params": 1 - after / before,
        "decode": 1 - (after + 2048 * kv_after) / (before + 2048 * kv_before),
    }
    assert saved[budget.what] >= budget.amount - 1e-9
    assert goal.saved(layers) == pytest.approx(saved[budget.what])


def test_a_cache_budget_never_takes_an_mlp(outline):
    found = within(meter(parse_budget("kv:-50%"), outline, candidates(outline)), candidates(outline), by_depth)
    assert set(found.layers) == {Layer("attn", 0), Layer("attn", 1)}


def test_no_layer_is_dropped_that_the_budget_can_do_without(outline):
    goal = meter(parse_budget("params:-30%"), outline, candidates(outline))
    layers = within(goal, candidates(outline), by_depth).layers
    assert not any(goal.reached([other for other in layers if other != layer]) for layer in layers)


def test_a_budget_beyond_all_layers_is_refused(outline):
    goal = meter(Budget("params", 0.9999), outline, candidates(outline))
    with pytest.raises(PlanError, match=r"budget params:-99.99% cannot be reached"):
        within(goal, candidates(outline), by_depth)


def test_a_measured_table_decides_what_a_layer_saves(outline):
    table = {layer: 2.0 if layer == Layer("mlp", 3) else 0.1 for layer in candidates(outline)}
    goal = meter(parse_budget("measured:1.2x"), outline, candidates(outline), latency=Latency(table, 10.0))
    assert within(goal, candidates(outline), by_depth).layers == (Layer("mlp", 3),)


def test_measured_time_without_a_table_is_refused(outline):
    with pytest.raises(PlanError, match="time that each layer takes"):
        meter(parse_budget("measured:1.2x"), outline, candidates(outline))


@pytest.mark.parametrize("text", ["params:-20%", "decode:1.3x", "measured:1.3x"])
def test_an_attention_layer_that_leaves_a_map_saves_less(outline, text):
    table = Latency(dict.fromkeys(candidates(outline), 1.0), 10.0)
    bare, mapped = (meter(parse_budget(text), outline, candidates(outline), 2048, table, size) for size in (0, 500))
    attn, mlp = Layer("attn", 1), Layer("mlp", 1)
    assert 0 < mapped.saves(attn) < bare.saves(attn) and mapped.saves(mlp) == bare.saves(mlp)
