"""What an improver chooses and repairs: specs, budgets and repairs in combination."""

import pytest
import torch
from family_sizes import SIZES

from dropformer.metrics.blockwise.layer_metrics import mean_similarity
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.repair.ridge import token_weights
from dropformer.metrics.search.calibration import SearchSize, search_size
from dropformer.metrics.search.improve import Improver, improve
from dropformer.metrics.search.registry import METRICS, MetricEntry
from dropformer.metrics.search.strategy import Strategy, Target, quality
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import ModelError, PlanError

REF = CalibrationRef(name="ids", samples=8, length=24, seed=0, packed=True, skip_first=0, hash="0")


@pytest.fixture
def improver(tiny):
    def made(how: Strategy, family: str = "llama", scored=None) -> Improver:
        model = tiny(family, **SIZES.get(family, {}))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim > 1 and "embed" not in name:
                    p *= 6  # a random model's branches add almost nothing: make them matter
        ids = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(3))
        count = torch.ones_like(ids, dtype=torch.bool) if scored is None else scored.expand_as(ids)
        data = [Windows(part, count[:4], torch.ones_like(part, dtype=torch.bool), REF) for part in (ids[:4], ids[4:])]
        return Improver(model, data, how)

    return made


def chosen(found: Improver, spec: str, **more):
    return found.choose_forms(Target(spec, **more))[0]


@pytest.mark.parametrize("select", ["iterative", "greedy"])
def test_what_a_block_takes_with_it_is_not_chosen_again(improver, select):
    layers = chosen(improver(Strategy(select=select, stride=1)), "block:1,attn:2")
    assert [layer.kind for layer in layers] == ["block", "attn", "attn"]
    assert len({layer.index for layer in layers}) == 3


@pytest.mark.parametrize("select", ["iterative", "greedy"])
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("attn:2,attn:3", "dropped already; ask for fewer"),
        ("attn=1,attn=1", "dropped by another item"),
        ("attn:2,attn:2", "drops every attention layer"),
        ("attn:4", "drops every attention layer"),
    ],
)
def test_a_search_refuses_what_a_ranking_refuses(improver, select, spec, said):
    with pytest.raises(PlanError, match=said):
        chosen(improver(Strategy(select=select, stride=1)), spec)


def test_published_lists_go_with_every_way_of_choosing(improver):
    found = improver(Strategy(select="greedy", stride=1))
    layers = chosen(found, "published:attn:2", published=lambda kind, count: [2, 1])
    assert layers == [Layer("attn", 2), Layer("attn", 1)]


def test_swaps_drop_no_layer_that_attends_to_less(improver):
    found = improver(Strategy(refine=1, stride=1))
    layers = found.outline.layers("attn")
    start = next(layer for layer in layers if found.refined([layer]) != [layer])
    others = {layer for layer in layers if layer != start}
    assert found.refined([start], cheaper=others) == [start]
    block = Layer("block", start.index)
    assert found.refined([block], cheaper=others) == [block]
    assert found.refined([], cheaper=others) == []


def test_iterative_ranks_by_the_metric_that_is_asked_for(improver):
    reverse = MetricEntry("the least similar first", lambda bench: {k: -v for k, v in mean_similarity(bench).items()})
    with METRICS.having("reverse", reverse):
        found = improver(quality(metric="reverse", select="iterative"))
        scores = found.ranking("similarity")()
        assert chosen(found, "attn:1") == [min((Layer("attn", i) for i in range(4)), key=lambda layer: scores[layer])]


@pytest.mark.parametrize("budget", ["kv:-75%", "kv:-60%"])
def test_a_budget_leaves_an_attention_layer(improver, budget):
    found = improver(Strategy(stride=1))
    layers = found.choose_forms(Target(budget=budget))[0]
    assert {layer.kind for layer in layers} == {"attn"} and len(layers) == 3


@pytest.mark.parametrize("budget", ["kv:-80%", "decode:9x"])
def test_a_budget_that_needs_every_attention_layer_is_refused(improver, budget):
    with pytest.raises(PlanError, match="cannot be reached"):
        improver(Strategy(stride=1)).choose_forms(Target(budget=budget))


def test_blocks_to_keep_must_be_there_for_a_budget_too(improver):
    with pytest.raises(PlanError, match="--keep names block 99"):
        improver(Strategy(stride=1)).choose_forms(Target(budget="kv:-25%", keep=[99]))


@pytest.mark.parametrize("repair", ["refit-all,lora", "refit,refit-all,lora", "linear,refit-all,lora"])
def test_what_was_refitted_can_be_healed(improver, repair):
    found = improver(quality(repair=repair))
    _, fixed, _ = improve(found, ModelRef(name="tiny"), Target("attn=1"))
    assert fixed.tensors and not any(tensor.is_inference() for tensor in fixed.tensors.values())


@pytest.mark.parametrize(("family", "spec", "repair"), [("llama", "block=1", "linear"), ("mixtral", "attn=1", "refit")])
def test_a_repair_with_nothing_to_change_says_so_and_is_not_measured(improver, family, spec, repair):
    found, said = improver(quality(repair=repair), family), []
    found.tell = said.append
    _, fixed, _ = improve(found, ModelRef(name="tiny"), Target(spec), found.data[0])
    assert said[-1] == f"{repair}: found nothing to change here" and not fixed.gates and not fixed.tensors


@pytest.mark.parametrize(
    ("how", "request_", "metric"),
    [
        (Strategy(metric="angular"), Target("attn:1"), "angular"),
        (Strategy(select="iterative"), Target("attn:1"), "iterative similarity"),
        (Strategy(select="greedy", refine=1), Target("attn:1"), "greedy kl, refined"),
        (Strategy(), Target(budget="kv:-25%"), "greedy kl"),
    ],
)
def test_a_plan_says_what_chose_it_and_on_which_texts(improver, how, request_, metric):
    plan, _, _ = improve(improver(how), ModelRef(name="tiny"), request_)
    assert plan.metric == metric
    assert plan.calibration["name"] == "ids,ids" and len(plan.calibration["texts"]) == 2


def test_a_stride_is_over_the_tokens_that_count(improver):
    """With all but the last token of a window out of the count, costs are still measured, on that one."""
    last = torch.zeros(1, 24, dtype=torch.bool)
    last[:, -1] = True
    found = improver(Strategy(select="greedy", stride=4), scored=last)
    assert all(abs(cost) > 1e-9 for cost in (found.cost([Layer("attn", i)]) for i in range(4)))


def test_a_token_that_begins_at_zero_has_a_finite_weight():
    stream = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    stream[:, 5] = 0
    weights = token_weights(stream)
    assert torch.isfinite(weights).all() and float(weights.sum()) == pytest.approx(60, rel=1e-4)


def test_a_hybrid_keeps_the_one_attention_that_has_keys_and_values(improver):
    """Only block 3 of this model has a softmax attention."""
    layers = chosen(improver(Strategy(select="greedy", stride=1), "qwen3_next"), "attn:2")
    assert len(layers) == 2 and Layer("attn", 3) not in layers


def test_models_that_write_no_text_are_refused_with_the_reason():
    from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vit = ViTForImageClassification(ViTConfig(**shape, image_size=32, patch_size=8))
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=64))
    for model in (vit, t5):
        with pytest.raises(ModelError, match="writes no text"):
            Improver(model, [], quality("best"))


def test_a_search_takes_the_passes_that_it_is_given():
    assert search_size(32768, 512, 2, 24.0, 1.5, 4) == SearchSize(4, 512)
    assert search_size(8192, 512, 2, 24.0, 1.5, 4) == SearchSize(2, 256)
