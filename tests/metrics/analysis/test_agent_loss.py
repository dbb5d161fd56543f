"""Ranking of attention layers by what agents take from them."""

import pytest
import torch
from transformers import BeitConfig, BeitModel, BertConfig, BertModel, ViTConfig, ViTModel

import dropformer
from dropformer.api import outline
from dropformer.metrics.analysis.agent_loss import agent_losses
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.rungs.agent import Agents

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


def test_losses_are_what_each_layer_adds_less_or_more_over_its_stream():
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8, initializer_range=0.3)).eval()
    pixels = torch.rand(2, 3, 32, 32)
    found = agent_losses(model, outline(model), [{"pixel_values": pixels}], Agents(4))
    seen = {}
    block = model.layers[1]
    block.register_forward_pre_hook(lambda _, args, kwargs: seen.update(x=args[0]), with_kwargs=True)
    block.attention.register_forward_hook(lambda _, args, out: seen.update(a=out[0]))
    pruned = dropformer.drop(model, _plan(model, "agent=1@4"))
    outputs = []
    with torch.no_grad():
        for each in (model, pruned):
            each(pixels)
            outputs.append(seen["a"])
    lost = ((outputs[1] - outputs[0]).square().sum(-1) / seen["x"].square().sum(-1)).mean()
    assert found[Layer("attn", 1)] == pytest.approx(float(lost), rel=1e-4)
    assert set(found) == {Layer("attn", i) for i in range(3)}


def test_padding_does_not_count_and_a_post_norm_layer_is_judged_by_what_it_writes():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, vocab_size=64, initializer_range=0.3)).eval()
    ids = torch.randint(3, 64, (1, 8))
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 3).long()], 1),
        "attention_mask": torch.tensor([[1] * 8 + [0] * 3]),
    }
    anatomy = outline(model)
    alone, behind = (agent_losses(model, anatomy, [batch], Agents(2)) for batch in ({"input_ids": ids}, padded))
    assert behind == pytest.approx(alone, rel=1e-4)
    with torch.no_grad():
        model.encoder.layer[1].attention.output.dense.weight.mul_(2)
    doubled = agent_losses(model, anatomy, [{"input_ids": ids}], Agents(2))
    assert doubled[Layer("attn", 1)] == pytest.approx(4 * alone[Layer("attn", 1)], rel=1e-3)


@pytest.mark.parametrize(
    ("bias", "why"),
    [("use_relative_position_bias", "relative_position_bias"), ("use_shared_relative_position_bias", "heads differ")],
)
def test_a_model_none_of_whose_layers_takes_agents_says_why(bias, why):
    model = BeitModel(BeitConfig(**SIZES, image_size=32, patch_size=8, **{bias: True})).eval()
    with pytest.raises(ArchitectureError, match=why):
        agent_losses(model, outline(model), [{"pixel_values": torch.rand(1, 3, 32, 32)}], Agents(4))


def _plan(model, spec):
    from dropformer.api import plan_unscored
    from dropformer.prune.artifact import ModelRef

    return plan_unscored(ModelRef(name="tiny", model_type=model.config.model_type), outline(model), spec, (), None)
