"""Estimates of encoders and vision models: one forward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, ViTConfig, ViTForImageClassification

import dropformer
from dropformer.api import outline, plan_unscored
from dropformer.eval.cost.counting import cost_of_config
from dropformer.eval.cost.encoder import pairs
from dropformer.eval.cost.estimate import estimate, forward_estimate
from dropformer.eval.cost.hardware import HARDWARE
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import ModelError, PlanError

A100 = HARDWARE["a100-80g"]
VIT = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 64,
       "patch_size": 8}  # fmt: skip


def test_flops_are_those_that_torch_counts():
    sizes = {**VIT, "hidden_size": 256, "intermediate_size": 512}  # norms, biases and positions count for little
    config = ViTConfig(**sizes, architectures=["ViTForImageClassification"])
    model = ViTForImageClassification(config).eval()
    plan = plan_unscored(ModelRef(name="tiny", model_type="vit"), outline(model), "agent=1,2@4,mlp=3", (), None)
    found = forward_estimate(cost_of_config(config), "agent=1,2@4,mlp=3", A100)
    assert found.dense.tokens == 65
    for side, each in ((found.dense, model), (found.pruned, dropformer.drop(model, plan))):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernels of a CPU are not counted
            each(torch.rand(1, 3, 64, 64))
        assert side.flops == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_agents_have_two_pairs_a_token_each():
    cost = cost_of_config(BertConfig(**{k: VIT[k] for k in list(VIT)[:4]}, architectures=["BertForMaskedLM"]))
    found = forward_estimate(cost, "agent:1@16", A100, tokens=200)
    assert sorted(pairs(block, 200) for block in found.pruned.cost.blocks) == [2 * 16 * 200] + 3 * [200 * 200]
    assert cost.tokens == 512 and found.speedup < 1 < forward_estimate(cost, "agent:1@16", A100, tokens=8192).speedup


def test_what_does_not_pay_is_said():
    cost = cost_of_config(ViTConfig(**VIT, architectures=["ViTModel"]))
    assert "cost more than they save up to 80 tokens" in "\n".join(forward_estimate(cost, "agent:2@40", A100).lines())
    assert "cost more" not in "\n".join(forward_estimate(cost, "agent:2@16", A100).lines())


def test_each_kind_of_model_refuses_the_rung_of_the_other():
    encoder = cost_of_config(ViTConfig(**VIT, architectures=["ViTModel"]))
    with pytest.raises(PlanError, match="this is an encoder"):
        forward_estimate(encoder, "window:1@16", A100)
    with pytest.raises(ModelError, match="forward_estimate"):
        estimate(encoder, "attn:1", A100)
    decoder = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
               "intermediate_size": 128, "vocab_size": 64}  # fmt: skip
    with pytest.raises(PlanError, match="this model is causal"):
        estimate(decoder, "agent:1@16", A100)
