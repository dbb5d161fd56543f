"""Rungs under a budget: what each saves, and which layer gets which."""

import copy

import pytest
import torch

from dropformer import api
from dropformer.metrics.search.budget import parse_budget
from dropformer.metrics.search.ladder import Option, check_rungs, climb, saved_share
from dropformer.metrics.search.rungs import PASSES, RungSearch, read_texts, rung_plan, searched
from dropformer.metrics.search.strategy import Target
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import PlanError
from dropformer.prune.rungs.registry import parse_rungs
from dropformer.prune.window import Window

DROP, WINDOW = parse_rungs("drop,window:6+2")
CONTEXT = 32


def options(**damages):
    return {
        Layer("attn", int(name[1:])): [Option(WINDOW, 0.2, window), Option(DROP, 0.25, drop)]
        for name, (window, drop) in damages.items()
    }


def test_the_least_damage_for_what_it_saves_comes_first_and_a_layer_can_take_the_harsher_step_later():
    known = options(l3=(0.01, 0.5), l7=(0.02, 0.3))
    chosen = {layer.index: str(option.rung) for layer, option in climb(known, 0.15).items()}
    assert chosen == {3: "window:6+2"}
    chosen = {layer.index: str(option.rung) for layer, option in climb(known, 0.42).items()}
    assert chosen == {3: "window:6+2", 7: "drop"}


def test_a_layer_that_gives_nothing_is_dropped_at_once():
    assert {str(o.rung) for o in climb(options(l2=(0.0, 0.0), l5=(1.0, 2.0)), 0.25).values()} == {"drop"}


def test_what_the_last_step_overshoots_by_is_given_back():
    known = {Layer("attn", 0): [Option(WINDOW, 0.1, 0.001)], Layer("attn", 1): [Option(DROP, 0.5, 0.02)]}
    assert list(climb(known, 0.5)) == [Layer("attn", 1)]


def test_a_budget_beyond_all_rungs_is_refused_with_what_they_save():
    with pytest.raises(PlanError, match=r"save 50.0% at most.*60.0%"):
        climb(options(l1=(0.1, 0.2), l2=(0.1, 0.2)), 0.6)


def test_a_rung_saves_cache_at_the_context_and_weights_only_where_it_has_none(tiny):
    outline, layer = api.outline(tiny("llama")), Layer("attn", 1)
    share = {
        (what, str(rung)): saved_share(outline, layer, rung, parse_budget(f"{what}:-10%"), CONTEXT)
        for what in ("kv", "params")
        for rung in (DROP, WINDOW)
    }
    assert share["kv", "drop"] == 0.25 and share["kv", "window:6+2"] == 0.25 * (CONTEXT - 8) / CONTEXT
    assert share["params", "window:6+2"] == 0.0 < share["params", "drop"]


@pytest.mark.parametrize("text", ["", "window", "drop:3", "tree", "window:0", "drop,drop", "drop,,window:4"])
def test_rungs_that_cannot_be_read_are_refused(text):
    with pytest.raises(PlanError):
        parse_rungs(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("linear,drop", "--repair linear"),
        ("drop,agent:4,window:8", "agents are for encoders"),
        ("drop", "without a window"),
        ("window:32", "larger --context"),
    ],
)
def test_rungs_that_a_budget_cannot_choose_among_are_refused(text, said):
    with pytest.raises(PlanError, match=said):
        check_rungs(parse_rungs(text), CONTEXT)


def test_a_plan_of_rungs_meets_its_budget_and_keeps_an_attention(tiny):
    model = tiny("llama", initializer_range=0.3, max_position_embeddings=200)
    outline, texts = api.outline(model), [torch.arange(200) % 61 + 3, torch.arange(200) % 7 + 3]

    told = []

    def made(budget, keep=(), rungs="drop,window:6+2"):
        target = Target(budget=budget, keep=keep, context=CONTEXT, rungs=parse_rungs(rungs))
        search = read_texts(model, outline, target.rungs, texts, keep)
        search.tick = told.append
        return rung_plan(search, ModelRef(name="tiny"), target), search

    plan, search = made("kv:-90%")
    assert told == sorted(told) and told[0] > 1 and told[-1] == search.passes
    assert plan.kv_share(CONTEXT) <= 0.1 + 1e-9 and len(plan.layers) == 3 and len(plan.windows) == 1
    assert search.kl == min(search.history) and 1 < search.passes <= PASSES
    kept, _ = made("kv:-50%", keep=(0,))
    assert kept.kv_share(CONTEXT) <= 0.5 and not any(layer.index == 0 for layer in [*kept.layers, *kept.windowed])
    milder = rung_plan(search, ModelRef(name="tiny"), Target(budget="kv:-20%", context=CONTEXT, rungs=(DROP, WINDOW)))
    assert milder.kv_share(CONTEXT) <= 0.8 and search.passes <= PASSES  # the layers' own costs are counted once
    several, _ = made("kv:-50%", rungs="window:2+1,window:8+1,window:20+1")
    assert several.kv_share(CONTEXT) <= 0.5 and not several.layers
    with pytest.raises(PlanError, match="ask for less"):
        made("kv:-97%")


@pytest.mark.parametrize("rungs", ["drop,window:6+2,window:40+2", "window:6+2,window:40+2"])
def test_a_budget_makes_the_same_choice_in_bfloat16(tiny, rungs):
    model = tiny("llama", initializer_range=0.3, max_position_embeddings=200)
    ids = torch.randint(3, 64, (200,), generator=torch.Generator().manual_seed(1))
    halved = copy.deepcopy(model).bfloat16()
    plans = []
    for one in (copy.deepcopy(halved).float(), halved):
        search = read_texts(one, api.outline(one), parse_rungs(rungs), [ids])
        target = Target(budget="kv:-60%", context=128, rungs=parse_rungs(rungs))
        plans.append((rung_plan(search, ModelRef(name="tiny"), target), search.kl))
    (plan, kl), (other, other_kl) = plans
    assert set(plan.layers) == set(other.layers) and plan.windows == other.windows
    assert other_kl == pytest.approx(kl, rel=0.1) and kl > 0.01


def test_a_round_puts_each_layer_back_and_keeps_the_better_plan():
    """Two layers that are harmless alone and harmful together: the second round takes another."""

    class Text:
        work, price = 1.0, 0.01
        damages = {Layer("attn", i): {Window(6, 2): 1.0, None: 1.0} for i in range(3)}

        def kl(self, actions):
            taken = {layer.index for layer in actions}
            return 0.1 * len(taken) + 0.05 * (2 in taken) + (1.0 if {0, 1} <= taken else 0.0)

    search = RungSearch([Text()], list(Text.damages), [Window(6, 2)])

    def weigh(costs):
        return climb({layer: [Option(WINDOW, 0.3, own[Window(6, 2)])] for layer, own in costs.items()}, 0.6)

    found = {layer.index for layer in searched(search, weigh)}
    assert 2 in found and len(found) == 2 and len(search.history) == 2 and search.kl < search.history[0]


def test_a_familys_own_windows_count_as_what_they_hold(tiny):
    """At 64 tokens three layers of 16 and one of 64 hold 112, and a window of 6 + 2 in that one saves 56 of them."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    model = tiny("gemma3_text", layer_types=kinds, sliding_window=16, max_position_embeddings=200)
    outline, own = api.outline(model), Layer("attn", 3)
    kv = outline.branch(own).kv
    assert outline.kv_at(64) == 112 * kv and outline.kv_at(4) == 16 * kv and outline.kv_per_token() == 4 * kv
    assert saved_share(outline, own, WINDOW, parse_budget("kv:-50%"), 64) == pytest.approx(56 / 112)
    assert saved_share(outline, Layer("attn", 0), DROP, parse_budget("kv:-50%"), 64) == pytest.approx(16 / 112)
    plan = api.plan_unscored(ModelRef(name="tiny"), outline, "window=3@6+2,attn=0", (), None)
    assert plan.kv_share(64) == pytest.approx((112 - 56 - 16) / 112)
