"""Linear maps as a rung: in a spec, in a plan, and among the rungs of a budget."""

import json

import pytest
import torch

import dropformer
from dropformer import api
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.search.far_text import FarText, Fitted
from dropformer.metrics.search.improve import Improver
from dropformer.metrics.search.rungs import mapped_modules, read_texts, rung_plan
from dropformer.metrics.search.strategy import Strategy, Target
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.choosing import choose_forms
from dropformer.prune.errors import PlanError
from dropformer.prune.rungs.linear import LinearMap
from dropformer.prune.rungs.registry import parse_rungs
from dropformer.prune.spec import named_layers

CONTEXT = 32
REF = CalibrationRef(name="ids", samples=8, length=24, seed=0, packed=True, skip_first=0, hash="0")


@pytest.fixture
def model(lettered):
    return lettered


@pytest.fixture
def search(tiny):
    model = tiny("llama", initializer_range=0.3, max_position_embeddings=200)
    ids = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(3))
    ones = torch.ones_like(ids, dtype=torch.bool)
    improver = Improver(model, [Windows(ids, ones, ones, REF)], Strategy(stride=1))
    rungs = parse_rungs("drop,linear,window:6+2")
    layers = api.outline(model).layers("attn")
    texts = [text_ids()]
    return (
        improver,
        read_texts(model, improver.outline, rungs, texts, (), Fitted(mapped_modules(improver, layers))),
        rungs,
    )


def test_a_spec_names_maps_beside_drops_and_the_most_redundant_layers_belong_to_its_first_item(tiny):
    outline = api.outline(tiny("llama"))
    similarity = {Layer("attn", i): value for i, value in enumerate((0.9, 0.8, 0.7, 0.6))}
    layers, maps = choose_forms(outline, "attn:1,linear:2", similarity)
    assert [str(layer) for layer in layers] == ["attn:0", "attn:1", "attn:2"] and maps == layers[1:]
    assert choose_forms(outline, "linear=2,attn=1") == ([Layer("attn", 2), Layer("attn", 1)], [Layer("attn", 2)])
    assert named_layers(layers, {}, maps) == "attn=0,linear=1,2"
    with pytest.raises(PlanError, match="protected by --keep or dropped by another item"):
        choose_forms(outline, "attn=1,linear=1")


def test_a_search_measures_the_very_map_that_the_repair_writes(search):
    improver, found, _ = search
    text, layer = found.texts[0], Layer("attn", 1)
    repair, variant = improver.repair([layer], None, [layer])
    assert list(repair.mapped) == [layer]
    measured = text.kl({layer: LinearMap()})
    again = FarText(improver.model, improver.outline, text_ids(), [], Fitted(lambda _: variant.modules()))
    assert measured == pytest.approx(again.kl({layer: LinearMap()}), rel=1e-5) and measured > 1e-4


def text_ids():
    return torch.arange(200) % 61 + 3


def test_a_budget_chooses_among_drop_map_and_window_what_harms_least_for_what_it_saves(search):
    _, found, rungs = search
    costs = found.alone()
    target = Target(budget="kv:-50%", context=CONTEXT, rungs=rungs)
    plan = rung_plan(found, ModelRef(name="tiny"), target)
    assert plan.kv_share(CONTEXT) <= 0.5 and set(plan.mapped) <= set(plan.layers)
    assert all(len(own) == 3 for own in costs.values())
    found._alone = {layer: {a: 1.0 + 9.0 * (a is None) for a in own} for layer, own in costs.items()}
    found._works = [text.work for text in found.texts]
    forced = rung_plan(found, ModelRef(name="tiny"), target)
    assert forced.mapped and forced.mapped == forced.layers  # they save all, and cost no more than a window


def test_a_plan_with_maps_is_not_followed_without_their_weights(tiny):
    model = tiny("llama")
    plan = api.plan_unscored(ModelRef(name="tiny"), api.outline(model), "attn=0,linear=2", (), None)
    assert plan.maps == ["attn:2"] and plan.fitted
    with pytest.raises(PlanError, match="attn:2: linear maps and folded sinks are fitted"):
        api.drop(model, plan)


@pytest.mark.parametrize("repair", [("refit-all", "linear", "refit"), "refit"])
def test_repairs_are_fitted_in_their_own_order_whatever_order_they_are_named_in(model, here, repair):
    opened = dropformer.open_model(model)
    plan = api.plan_unscored(opened.ref, api.outline(opened.model), "attn=2", (), None)
    _, found = dropformer.fit(opened, plan, [dropformer.Calibration("builtin", 3, 16)], repair)
    wanted = ["refit"] if repair == "refit" else ["linear", "refit", "refit-all"]
    tried = [gate.method for gate in found.gates]
    assert tried == [name for name in wanted if name in tried]


def test_fit_gives_a_plan_its_maps_and_counts_them(model, here):
    opened = dropformer.open_model(model)
    plan = api.plan_unscored(opened.ref, api.outline(opened.model), "attn=0,linear=2", (), None)
    plan, repair = dropformer.fit(opened, plan, [dropformer.Calibration("builtin", 3, 16)])
    pruned = dropformer.drop(opened, plan, repair)
    dropformer.save(pruned, here / "out")
    record = json.loads((here / "out" / "dropformer.json").read_text())
    assert record["maps"] == ["attn:2"] and record["dropped"]["attention"] == [0, 2]
    assert plan.savings.parameters_after == sum(p.numel() for p in pruned.parameters())
    assert "Linear maps are in place of attn:2." in (here / "out" / "README.md").read_text()
