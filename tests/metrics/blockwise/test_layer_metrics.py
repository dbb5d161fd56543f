"""Every metric on a tiny model, against definitions written out here."""

import math

import pytest
import torch

from dropformer import api
from dropformer.metrics.analysis.analyze import analyze_model
from dropformer.metrics.blockwise.layer_metrics import MetricContext, angular, relative_magnitude
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.search.registry import METRICS
from dropformer.prune.architecture import Layer
from dropformer.prune.discovery.discover import discover


def bench_of(model, ids, **fields):
    architecture = discover(model)
    return MetricContext(
        BlockRunner(model, architecture, [{"input_ids": ids}]), architecture, [None], **{"stride": 1, **fields}
    )


def test_similarity_is_that_of_the_one_pass_analysis(tiny, ids):
    model = tiny("llama")
    scores = analyze_model(model, [ids]).similarity()
    found = METRICS["similarity"].method()(bench_of(model, ids))
    assert found.keys() == scores.keys()
    assert all(found[layer] == pytest.approx(scores[layer], abs=1e-5) for layer in scores)


def test_the_angular_distance_of_orthogonal_vectors_is_half():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert angular(x, y).item() == pytest.approx(0.5)
    assert angular(x, x).item() == pytest.approx(1, abs=1e-3)


def test_relative_magnitude_is_the_share_that_the_layer_adds():
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert relative_magnitude(x, y).item() == pytest.approx(-4 / 5)


def test_leave_one_out_kl_is_that_of_the_really_dropped_model(tiny, ids):
    model = tiny("llama")
    found = METRICS["loo-kl"].method()(bench_of(model, ids))
    pruned = api.drop(model, plan_of(model, "attn=1"))
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].log_softmax(-1).double() for m in (model, pruned))
    assert -found[Layer("attn", 1)] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=2e-4)
    assert set(found) == set(discover(model).layers())


def test_leave_one_out_perplexity_is_that_of_the_really_dropped_model(tiny, ids):
    model = tiny("llama")
    found = METRICS["loo-perplexity"].method()(bench_of(model, ids))
    pruned = api.drop(model, plan_of(model, "mlp=2"))
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(pruned(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert -found[Layer("mlp", 2)] == pytest.approx(float(nll), abs=1e-5)


def plan_of(model, spec):
    from dropformer.prune.artifact import ModelRef

    return api.plan_unscored(ModelRef(name="tiny"), api.outline(model), spec, (), None)


def test_positions_that_are_not_scored_do_not_count(tiny, ids):
    model = tiny("llama")
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, :6] = False
    architecture = discover(model)
    bench = MetricContext(BlockRunner(model, architecture, [{"input_ids": ids}]), architecture, [scored])
    expected = analyze_model(model, [({"input_ids": ids}, scored)]).similarity()
    found = METRICS["similarity"].method()(bench)
    assert all(math.isclose(found[layer], expected[layer], abs_tol=1e-5) for layer in expected)
