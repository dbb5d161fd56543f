"""Windows with constants in place of sinks: the attention, its caches, the fit, and the checkpoint."""

import copy
import json

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, StaticCache

import dropformer
from dropformer import api
from dropformer.metrics.blockwise.divergence import kl_divergence
from dropformer.metrics.repair.base import Repair
from dropformer.metrics.search.far_text import FarText, Fitted
from dropformer.metrics.search.fold import SINKS, fit_folds, named_constants
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import PlanError
from dropformer.prune.loading import window_attention
from dropformer.prune.loading.parts import continued
from dropformer.prune.loading.window_attention import constant_shapes
from dropformer.prune.window import Window

WIDTH = 5
PLACES = [(Layer("attn", i), Window(WIDTH, fold=True)) for i in (0, 2)]


def random_constants(model):
    """Constants of a size that matters."""
    draw = torch.Generator().manual_seed(7)
    shapes = constant_shapes(model.model.layers[0].self_attn)
    return {place: tuple(torch.randn(shape, generator=draw) for shape in shapes) for place in PLACES}


def folded(dense, constants):
    outline = api.outline(dense)
    plan = api.plan_unscored(ModelRef(name="tiny"), outline, f"window=0,2@{WIDTH}+fold", (), None)
    return api.drop(dense, plan, Repair(named_constants(outline, constants)))


def by_formula(dense, ids, real, constants):
    """Logits with the formula written out in both layers: all keys, one mask, nothing cached."""
    first = real.int().argmax(1)[:, None]
    q, k = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])[None]
    seen = ((k <= q) & (q - k < WIDTH))[None] & (k >= first[:, None])[..., :]
    on = torch.arange(ids.shape[1])[None] - first >= WIDTH  # [B, T]

    def attend(module, query, key, value, _mask, scaling, **_):
        logit, constant = module.constants
        groups = query.shape[1] // key.shape[1]
        key, value, constant = (t.repeat_interleave(groups, -3 if t.ndim == 4 else 0) for t in (key, value, constant))
        weights = (query @ key.mT * scaling).masked_fill(~seen[:, None], -1e30).exp()
        sink = torch.where(on[:, None], logit[None, :, None].exp(), torch.tensor(0.0))[..., None]
        total = weights.sum(-1, keepdim=True) + sink
        return ((weights @ value + sink * constant[None, :, None]) / total.clamp_min(1e-30)).transpose(1, 2), None

    AttentionInterface.register("formula", attend)
    dense = copy.deepcopy(dense)
    for (layer, _), pair in constants.items():
        module = dense.model.layers[layer.index].self_attn
        module.config, module.constants = copy.copy(module.config), pair
        module.config._attn_implementation_internal = "formula"
    with torch.no_grad():
        return dense(ids, attention_mask=real.long(), use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("band", [2, 256])
def test_a_folded_window_computes_its_formula_and_nothing_else_within_the_first_window(
    tiny, batch, monkeypatch, band, attention
):
    monkeypatch.setattr(window_attention, "BAND", band)
    ids, real = batch
    dense = tiny("llama", initializer_range=0.3, attn_implementation=attention)
    constants = random_constants(dense)
    model, want = folded(dense, constants), by_formula(dense, ids, real, constants)
    with torch.no_grad():
        got, plain = model(ids, attention_mask=real.long(), use_cache=False).logits, dense(ids[:1]).logits
        short = model(ids[:1, :WIDTH], use_cache=False).logits
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(short, plain[:, :WIDTH], atol=2e-5, rtol=1e-4)
    assert (plain - want[:1])[:, WIDTH:].abs().max() > 0.1


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_chunks_and_single_tokens_through_a_cache_of_the_window_alone_give_what_no_cache_gives(tiny, batch, kind):
    ids, real = batch
    dense = tiny("qwen3", initializer_range=0.3)
    constants = random_constants(dense)
    model, want = folded(dense, constants), by_formula(dense, ids, real, constants)
    cache = kind(config=model.config, **({"max_cache_len": 40} if kind is StaticCache else {}))
    found, at = [], 0
    with torch.no_grad():
        for n in (4, 7, 1, 1, 6, 1, 1, 1, 1):
            places, mask = torch.arange(at, at + n).expand(2, -1), real[:, : at + n].long()
            chunk = model(ids[:, at : at + n], attention_mask=mask, past_key_values=cache, position_ids=places)
            found.append(chunk.logits)
            at += n
    torch.testing.assert_close(torch.cat(found, 1)[real], want[real], atol=5e-5, rtol=1e-3)
    assert max(cache.layers[i].keys.shape[2] for i in (0, 2)) <= WIDTH < cache.layers[1].keys.shape[2]


def test_what_constants_stand_for_is_what_the_first_tokens_give_on_average(tiny, ids):
    """Against the sums written out with the whole matrix of logits."""
    dense = tiny("llama", initializer_range=0.3)
    ids = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(5))
    seen = {}

    def note(module, query, key, value, _mask, scaling, **_):
        seen["qkv"] = query, key, value, scaling
        return torch.zeros(len(query), query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("note", note)
    twin = copy.deepcopy(dense)
    twin.model.layers[0].self_attn.config = copy.copy(twin.config)
    twin.model.layers[0].self_attn.config._attn_implementation_internal = "note"
    with torch.no_grad():
        twin(ids)
    q, k, v, scaling = seen["qkv"]
    groups = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(groups, 1).mT * scaling
    row, col = torch.arange(40)[:, None], torch.arange(40)[None]
    weights = logits.masked_fill(~((col <= row) & ((row - col < WIDTH) | (col < SINKS))), -1e30).softmax(-1)
    weights = weights[:, :, WIDTH:, :SINKS].unflatten(1, (-1, groups))
    values = (weights @ v[:, :, None, :SINKS]).sum((0, 2, 3)) / weights.sum((0, 2, 3, 4))[:, None]
    (found,) = fit_folds(dense, api.outline(dense), PLACES[:1], [{"input_ids": ids}]).values()
    torch.testing.assert_close(found[0], logits[:, :, WIDTH:, :SINKS].logsumexp(-1).mean((0, 2)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], values, atol=1e-5, rtol=1e-4)


def test_a_search_measures_a_folded_window_as_the_model_that_is_written_attends(tiny):
    dense = tiny("llama", initializer_range=0.3, max_position_embeddings=200)
    outline, constants = api.outline(dense), random_constants(dense)
    text = FarText(dense, outline, torch.arange(200) % 61 + 3, [PLACES[0][1]], Fitted(constants=dict.fromkeys(
        ((layer, PLACES[0][1]) for layer in outline.layers("attn")), constants[PLACES[0]])))  # fmt: skip
    model = folded(dense, constants | {PLACES[1]: constants[PLACES[0]]})
    with torch.inference_mode():
        logits = model(input_ids=text.tail, past_key_values=continued(text.cache), use_cache=True).logits[0]
    expected = float(kl_divergence(text.dense, logits.log_softmax(-1)).mean())
    assert text.kl(dict(PLACES)) == pytest.approx(expected, rel=1e-4) and expected > 1e-4


def test_a_model_with_folded_windows_is_written_and_loads_as_it_was(lettered, here):
    opened = dropformer.open_model(lettered)
    plan = api.plan_unscored(opened.ref, api.outline(opened.model), "attn=3,window=1,2@5+fold", (), None)
    with pytest.raises(PlanError, match=r"attn:1@5\+fold, attn:2@5\+fold: linear maps and folded sinks are fitted"):
        dropformer.drop(opened, plan)
    plan, repair = dropformer.fit(opened, plan, [dropformer.Calibration("builtin", 3, 16)])
    pruned = dropformer.drop(opened, plan, repair)
    dropformer.save(pruned, here / "out")
    record = json.loads((here / "out" / "dropformer.json").read_text())
    assert record["windows"] == {"attn:1": "5+fold", "attn:2": "5+fold"}
    ids, again = torch.arange(3, 33)[None], dropformer.load(here / "out")
    assert plan.savings.parameters_after == sum(p.numel() for p in again.parameters())
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, pruned(ids).logits, atol=0, rtol=0)
    assert all(p.abs().max() > 0 for name, p in again.named_parameters() if "sink_" in name)


def test_a_module_whose_logits_are_capped_takes_no_constants(tiny):
    dense = tiny("gemma2", layer_types=["full_attention"] * 4)
    with pytest.raises(PlanError, match="caps its logits"):
        fit_folds(dense, api.outline(dense), PLACES, [])
