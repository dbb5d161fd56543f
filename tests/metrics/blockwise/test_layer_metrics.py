"""Every metric on a tiny model, against definitions written out here."""

import math

import pytest
import torch

from dropformer import api
from dropformer.metrics.analysis.analyze import analyze_model
from dropformer.metrics.blockwise.layer_metrics import METRICS, MetricContext, Moments, angular, relative_magnitude
from dropformer.metrics.blockwise.runner import BlockRunner
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
    found = METRICS["similarity"](bench_of(model, ids))
    assert found.keys() == scores.keys()
    assert all(found[layer] == pytest.approx(scores[layer], abs=1e-5) for layer in scores)


def test_reverse_ranks_the_other_way_round(tiny, ids):
    bench = bench_of(tiny("llama"), ids)
    best, worst = METRICS["similarity"](bench), METRICS["reverse"](bench)
    assert sorted(best, key=best.get) == sorted(worst, key=worst.get, reverse=True)


def test_the_angular_distance_of_orthogonal_vectors_is_half():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert angular(x, y).item() == pytest.approx(0.5)
    assert angular(x, x).item() == pytest.approx(1, abs=1e-3)


def test_relative_magnitude_is_the_share_that_the_layer_adds():
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert relative_magnitude(x, y).item() == pytest.approx(-4 / 5)


def test_leave_one_out_kl_is_that_of_the_really_dropped_model(tiny, ids):
    model = tiny("llama")
    found = METRICS["loo-kl"](bench_of(model, ids))
    pruned = api.drop(model, plan_of(model, "attn=1"))
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].log_softmax(-1).double() for m in (model, pruned))
    assert -found[Layer("attn", 1)] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=2e-4)
    assert set(found) == set(discover(model).layers())


def test_leave_one_out_perplexity_is_that_of_the_really_dropped_model(tiny, ids):
    model = tiny("llama")
    found = METRICS["loo-perplexity"](bench_of(model, ids))
    pruned = api.drop(model, plan_of(model, "mlp=2"))
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(pruned(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert -found[Layer("mlp", 2)] == pytest.approx(float(nll), abs=1e-5)


def plan_of(model, spec):
    from dropformer.prune.artifact import ModelRef

    return api.plan_unscored(ModelRef(name="tiny"), api.outline(model), spec, (), None)


def test_the_cca_bound_of_a_linear_layer_is_zero_and_of_noise_is_the_width():
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(4000, 6, generator=draw), torch.randn(4000, 6, generator=draw)
    linear, unrelated = Moments(6), Moments(6)
    linear.add(x, x @ torch.randn(6, 6, generator=draw) + 1)
    unrelated.add(x, noise)
    assert linear.unexplained() == pytest.approx(0, abs=1e-6)
    assert unrelated.unexplained() == pytest.approx(6, abs=0.05)


def test_cca_ranks_a_model_and_is_never_positive(tiny):
    ids = torch.randint(3, 64, (8, 64), generator=torch.Generator().manual_seed(1))
    found = METRICS["cca"](bench_of(tiny("llama"), ids))
    assert all(-32 <= value <= 0 for value in found.values())


def test_random_is_the_same_for_the_same_seed(tiny, ids):
    model = tiny("llama")
    one, again, other = (METRICS["random"](bench_of(model, ids, seed=seed)) for seed in (0, 0, 1))
    assert one == again != other


def test_positions_that_are_not_scored_do_not_count(tiny, ids):
    model = tiny("llama")
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, :6] = False
    architecture = discover(model)
    bench = MetricContext(BlockRunner(model, architecture, [{"input_ids": ids}]), architecture, [scored])
    expected = analyze_model(model, [({"input_ids": ids}, scored)]).similarity()
    found = METRICS["similarity"](bench)
    assert all(math.isclose(found[layer], expected[layer], abs_tol=1e-5) for layer in expected)
