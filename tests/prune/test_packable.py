"""Plans that pack: pairs of neighbours, the best of them, and what that costs."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropformer.prune.block_map import map_blocks
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import PlanError
from dropformer.prune.packable import best_pairs, choose_packable
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery


def tried_one_by_one(worth, count):
    """The largest worth of `count` disjoint pairs of neighbours, by trying all."""
    starts = [i for i in range(len(worth) - 1) if worth[i] is not None and worth[i + 1] is not None]
    sets = [s for s in combinations(starts, count) if all(b - a > 1 for a, b in pairwise(s))]
    return max((sum(worth[i] + worth[i + 1] for i in s) for s in sets), default=None)


@given(st.lists(st.one_of(st.none(), st.integers(-9, 9)), max_size=10), st.integers(1, 4))
@settings(deadline=None)
def test_the_best_pairs_are_those_that_trying_all_finds(worth, count):
    found = best_pairs(worth, count)
    want = tried_one_by_one(worth, count)
    assert (found is None) == (want is None)
    if found is not None:
        assert all(b - a > 1 for a, b in pairwise(found))
        assert sum(worth[i] + worth[i + 1] for i in found) == want


@pytest.fixture
def model(tiny):
    return tiny("llama")


@pytest.fixture
def outline(model):
    return summarize(model, discover(model))


def similar(outline, *layers):
    """Scores by which these layers are the most redundant."""
    every = outline.layers("attn") + outline.layers("mlp")
    return {layer: 0.9 if str(layer) in layers else 0.5 + 0.01 * layer.index for layer in every}


def test_an_mlp_goes_with_the_next_attention_where_they_are_the_most_redundant(outline, model, ids):
    layers, cost = choose_packable(outline, "joint:2", similar(outline, "mlp:1", "attn:2"))
    assert {str(layer) for layer in layers} == {"mlp:1", "attn:2"}
    assert cost == 0
    pruned = apply_surgery(model, plan_surgery(outline, layers, model))
    assert type(pruned).__name__ == "LlamaForCausalLM"
    assert pruned.config.num_hidden_layers == 3
    assert torch.isfinite(pruned(ids).logits).all()


def test_what_packing_costs_is_the_similarity_given_up(outline):
    scores = similar(outline, "attn:1", "attn:3")
    layers, cost = choose_packable(outline, "joint:2", scores)
    assert map_blocks(outline, layers).packed
    assert {str(layer) for layer in layers} == {"attn:3", "mlp:3"}
    assert cost == pytest.approx((0.9 + 0.9 - 0.9 - 0.53) / 2)


def test_protected_blocks_stay(outline):
    layers, _ = choose_packable(outline, "joint:2", similar(outline, "attn:3", "mlp:3"), keep=[-1])
    assert 3 not in {layer.index for layer in layers}


@pytest.mark.parametrize(
    ("spec", "said"),
    [("attn:2", "joint:N with an even N"), ("joint:3", "pairs make an even number"), ("joint:99", "ask for fewer")],
)
def test_a_spec_that_cannot_pack_says_what_to_write(outline, spec, said):
    with pytest.raises(PlanError, match=said):
        choose_packable(outline, spec, similar(outline))


def test_parallel_blocks_that_would_pair_across_do_not_pack(tiny):
    model = tiny("gptj", n_embd=32, n_layer=4, n_head=4, n_inner=48, rotary_dim=4)
    outline = summarize(model, discover(model))
    with pytest.raises(PlanError, match="leave out --packable"):
        choose_packable(outline, "joint:2", similar(outline, "mlp:1", "attn:2"))
