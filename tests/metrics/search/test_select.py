"""Choosing layers together: the searches against brute force, and against what they are measured on."""

from itertools import combinations

import pytest
import torch
from family_sizes import SIZES

from dropformer.metrics.blockwise.divergence import DenseReference
from dropformer.metrics.blockwise.layer_metrics import MetricContext, Ranking, mean_similarity
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import variant
from dropformer.metrics.search.select import KL, Count, Greedily, greedy, iterative, refine
from dropformer.prune.architecture import Layer
from dropformer.prune.discovery.discover import discover
from dropformer.prune.loading.skipped_modules import Skipped


@pytest.fixture
def bench(tiny, ids):
    model = tiny("llama", num_hidden_layers=3)
    with torch.no_grad():  # a random model's branches add almost nothing: make them matter, each its own way
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight *= 40 * (i + 1)
            layer.self_attn.v_proj.weight *= 10
            layer.mlp.down_proj.weight *= 400 / (i + 1)
    architecture = discover(model)
    return MetricContext(BlockRunner(model, architecture, [{"input_ids": ids}]), architecture, [None], stride=1)


@pytest.fixture
def kl(bench):
    return KL(DenseReference(bench.runner, 1), dropping(bench.runner.model, bench.architecture))


def dropping(model, architecture):
    return lambda gone: variant(model, architecture, gone)


def layers(kind):
    return [Layer(kind, i) for i in range(3)]


@pytest.mark.parametrize("kinds", [("attn",), ("mlp",), ("attn", "mlp")])
def test_greedy_takes_the_cheapest_layer_each_time(kl, kinds):
    candidates = [layer for kind in kinds for layer in layers(kind)]
    chosen = []
    for _ in range(2):
        rest = [layer for layer in candidates if layer not in chosen]
        chosen.append(min(rest, key=lambda layer: kl([*chosen, layer])))
    assert set(greedy(candidates, Count(2), kl).layers[:1]) == {chosen[0]}
    assert greedy(candidates, Count(1), kl).costs == (min(kl([layer]) for layer in candidates),)
    assert greedy(candidates, Count(2), kl).costs[1] == kl(greedy(candidates, Count(2), kl).layers)


def test_greedy_and_its_refinement_reach_the_best_pair_of_three(kl):
    candidates = layers("attn")
    best = min(combinations(candidates, 2), key=kl)
    found = refine(greedy(candidates, Count(2), kl).layers, candidates, kl)
    assert set(found.layers) == set(best)


def test_refining_the_worst_pair_never_makes_it_worse_and_finds_the_best(kl):
    candidates = layers("mlp")
    pairs = sorted(combinations(candidates, 2), key=kl)
    found = refine(pairs[-1], candidates, kl, rounds=3)
    assert found.costs[0] == kl(found.layers) == kl(pairs[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "qwen3_moe", "xlnet"])
def test_candidates_measured_together_cost_what_they_cost_alone(tiny, ids, family):
    """Whole blocks and a pair among them; by turns in BLOOM (biases count rows) and XLNet (tokens first)."""
    model = tiny(family, **SIZES.get(family, {}))
    with torch.no_grad():  # a random model's branches add almost nothing
        for name, p in model.named_parameters():
            p *= 6 if p.ndim > 1 and "embed" not in name else 1
    architecture = discover(model)
    dense = DenseReference(BlockRunner(model, architecture, [{"input_ids": row[None]} for row in ids]), 1)
    sets = [[layer] for layer in architecture.layers()] + [[Layer("attn", 1), Layer("mlp", 2)]]
    sets = [[layer for layer in gone if architecture.branches(layer)] for gone in sets]
    alone, together = (KL(dense, dropping(model, architecture)) for _ in range(2))
    together.ahead(sets)
    for gone in sets:
        assert together.measured[frozenset(gone)] == pytest.approx(alone(gone), rel=1e-3, abs=1e-7)
    assert dense._batchable is (family not in ("bloom", "xlnet"))


def test_blocks_behind_the_candidates_run_once_for_all_of_them(bench, kl):
    rows = []
    last = bench.runner.model.model.layers[2]
    assert kl.dense._batchable
    hook = last.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    kl.ahead([Layer(kind, i)] for kind in ("attn", "mlp") for i in (0, 1))
    hook.remove()
    assert rows == [4 * len(bench.runner.start(0))]


def test_lazy_greedy_measures_fewer_sets_than_there_are(kl):
    candidates = layers("attn") + layers("mlp")
    greedy(candidates, Count(3), kl, how=Greedily(2))
    assert len(kl.measured) <= 6 + 2 + 2


def test_a_layer_is_measured_by_what_it_costs_on_top_of_those_gone():
    one, other, third = layers("attn")
    table = {frozenset({one}): 1.0, frozenset({other}): 2.0, frozenset({third}): 5.0}
    together = {frozenset({one, other}): 20.0, frozenset({one, third}): 6.5}
    found = greedy([one, other, third], Count(2), lambda gone: {**table, **together}[frozenset(gone)])
    assert found.layers == (one, third) and found.costs == (1.0, 6.5)


def test_a_chosen_block_takes_its_branches_out_of_the_running():
    block, attn = Layer("block", 1), Layer("attn", 1)
    found = greedy([block, attn, Layer("attn", 0)], Count(2), lambda gone: float(len(gone)))
    assert set(found.layers) in ({block, Layer("attn", 0)}, {attn, Layer("attn", 0)})


def test_ties_drop_the_deeper_layer():
    assert greedy(layers("attn"), Count(2), lambda gone: 0.0).layers == (Layer("attn", 2), Layer("attn", 1))


def test_iterative_scores_the_model_without_what_has_gone(bench):
    found = iterative(Ranking(bench), layers("attn"), 2)
    model = bench.runner.model
    first = model.model.layers[found.layers[0].index]
    kept, norm = first.self_attn, first.input_layernorm
    first.self_attn, first.input_layernorm = Skipped(["zeros", None]), Skipped("input")
    scores = mean_similarity(bench)
    first.self_attn, first.input_layernorm = kept, norm
    left = [layer for layer in layers("attn") if layer != found.layers[0]]
    assert found.layers[1] == max(left, key=scores.get)
    assert found.costs[1] == pytest.approx(1 - scores[found.layers[1]], abs=1e-6)


def test_iterative_keeps_the_surviving_half_of_a_block_running(bench):
    ran = []
    hooks = [
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(bench.runner.model.model.layers)
    ]
    iterative(Ranking(bench), layers("attn"), 2)
    for hook in hooks:
        hook.remove()
    assert ran.count(0) == ran.count(1) == ran.count(2) == 2
