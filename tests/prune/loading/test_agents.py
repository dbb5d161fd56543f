"""Agent attention: what it computes, what it leaves alone, and what it refuses."""

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, ViTConfig, ViTModel

import dropformer
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import PlanError
from dropformer.prune.loading.agent_attention import NoAgents, pooled, pools, real_tokens, through_agents
from dropformer.prune.rungs.agent import Agents
from dropformer.prune.surgery.rungs import check_rungs

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, vocab_size=64, initializer_range=0.3)).eval()


def vit():
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=4, initializer_range=0.3)).eval()


def _plan(model, spec):
    from dropformer.api import outline, plan_unscored
    from dropformer.prune.artifact import ModelRef

    return plan_unscored(ModelRef(name="tiny", model_type=model.config.model_type), outline(model), spec, (), None)


class Shape(torch.nn.Module):
    """What the function reads of an attention module."""

    agents, has_patches = 4, False


def formula(query, agents, key, value):
    """softmax(Q A^T) softmax(A K^T) V, written out."""
    size = query.shape[-1] ** 0.5
    return (query @ agents.mT / size).softmax(-1) @ ((agents @ key.mT / size).softmax(-1) @ value)


def test_it_computes_the_formula_of_the_paper():
    query, key, value = torch.randn(3, 2, 4, 12, 8)
    found, weights = through_agents(Shape(), query, key, value, None)
    agents = query.reshape(2, 4, 4, 3, 8).mean(3)
    torch.testing.assert_close(found, formula(query, agents, key, value).transpose(1, 2))
    assert weights is None


def test_patches_are_pooled_in_squares_and_the_class_token_apart():
    query = torch.randn(1, 2, 1 + 16, 8)
    square = query[:, :, 1:].reshape(1, 2, 2, 2, 2, 2, 8).mean((3, 5)).reshape(1, 2, 4, 8)
    torch.testing.assert_close(pooled(query, 4, has_patches=True), square)
    torch.testing.assert_close(pooled(query, 17), query)


def test_padding_pools_as_without_padding():
    query = torch.randn(2, 3, 7, 8)
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
    found = pools(real, 3)[:, None] @ query
    torch.testing.assert_close(found[1:], pooled(query[1:], 3))
    torch.testing.assert_close(found[:1], pooled(query[:1, :, 2:], 3))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_no_output_of_an_encoder(side, attention):
    model = bert()
    model.set_attn_implementation(attention)
    pruned = dropformer.drop(model, _plan(model, "agent=0,2@4"))
    short, long = torch.randint(3, 64, (1, 6)), torch.randint(3, 64, (1, 9))
    zeros, keep = torch.zeros(1, 3, dtype=torch.long), slice(3, None) if side == "left" else slice(0, 6)
    ids = torch.cat([torch.cat([zeros, short] if side == "left" else [short, zeros], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0 if side == "left" else 1
    mask[0, 6:] = 1 if side == "left" else 0
    places = torch.arange(9).expand(2, 9).clone()
    places[0, keep] = torch.arange(6)
    with torch.no_grad():
        alone = pruned(input_ids=short).last_hidden_state
        padded = pruned(input_ids=ids, attention_mask=mask, position_ids=places).last_hidden_state
        dense = model(input_ids=short).last_hidden_state
    torch.testing.assert_close(padded[:1, keep], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1:], pruned(input_ids=long).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert (alone - dense).abs().max() > 1e-3  # it does do something else


def test_masks_of_anything_but_padding_are_refused():
    mask = torch.ones(1, 1, 4, 4).bool()
    assert real_tokens(mask).all() and real_tokens(None) is None
    assert real_tokens(torch.tensor([[0.0, -1e9]])[:, None, None]).tolist() == [[True, False]]
    bias = torch.zeros(1, 1, 4, 4).index_fill(3, torch.tensor([1]), 0.5)
    for wrong in (mask.tril(), bias, torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4)):
        with pytest.raises(NoAgents, match="padding alone"):
            real_tokens(wrong)


def test_a_mask_by_query_stops_a_pruned_encoder():
    model = bert()
    pruned = dropformer.drop(model, _plan(model, "agent=1@2"))
    with pytest.raises(NoAgents, match="tokens differ"):
        pruned(input_ids=torch.ones(1, 5).long(), attention_mask=torch.ones(1, 1, 5, 5).bool().tril())


def test_an_agent_for_every_two_tokens_of_any_image_size_runs():
    model = vit()
    pruned = dropformer.drop(model, _plan(model, "agent=1@4"))
    for height, width in ((32, 32), (48, 48), (32, 48)):
        assert pruned(torch.rand(1, 3, height, width), interpolate_pos_encoding=True).last_hidden_state.isfinite().all()


def test_gradients_reach_every_projection():
    model = bert()
    pruned = dropformer.drop(model, _plan(model, "agent=1@2")).train()
    pruned(input_ids=torch.ones(2, 8).long()).last_hidden_state.square().sum().backward()
    own = pruned.encoder.layer[1].attention.self
    assert all(layer.weight.grad.abs().sum() > 0 for layer in (own.query, own.value))


def test_it_is_saved_and_loads_again(tmp_path):
    model = vit()
    plan = _plan(model, "agent=0,2@4,mlp=1")
    assert plan.agents == {"attn:0": 4, "attn:2": 4} and plan.spec == "agent=0,2@4,mlp=1"
    pruned = dropformer.drop(model, plan)
    dropformer.save(pruned, tmp_path / "out")
    again = AutoModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(again(pixels).last_hidden_state, pruned(pixels).last_hidden_state)
    assert again.config.dropformer_modules["layers.0.attention"] == {"agents": 4}


@pytest.mark.parametrize("spec", ["agent=0@4"])
def test_causal_attention_takes_no_agents(spec):
    model = CLIPTextModel(CLIPTextConfig(**SIZES, vocab_size=64)).eval()
    with pytest.raises(PlanError, match="CLIPAttention is causal"):
        dropformer.drop(model, _plan(model, spec))


def test_the_dense_model_is_unchanged_by_the_check():
    model = bert()
    ids = torch.randint(3, 64, (1, 9))
    before, modules = model(ids).last_hidden_state, dict(model.named_modules())
    check_rungs(dropformer.api.outline(model), model, {Layer("attn", 1): Agents(2)})
    assert torch.equal(model(ids).last_hidden_state, before) and dict(model.named_modules()) == modules
