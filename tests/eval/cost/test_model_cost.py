import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import dropformer
from dropformer import api
from dropformer.eval.cost.counting import cost_of
from dropformer.eval.cost.memory import parameter_count
from dropformer.eval.cost.model_cost import Experts
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import ArchitectureError, PlanError

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


def build(model_type, device="cpu", **more):
    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model(model_type, **(SIZES | more))
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "olmo2", "phi", "gpt_neox", "mixtral", "gpt2"])
def test_the_parts_of_the_cost_add_up_to_the_parameters(model_type):
    model = build(model_type)
    assert cost_of(model).parameters == parameter_count(model)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", "qwen3"])
def test_dropping_removes_exactly_the_branch_with_its_norms(model_type):
    model = build(model_type, "meta")
    block = model.model.layers[1]
    attention_norms = {"llama": 1, "qwen3": 1, "gemma2": 2, "olmo2": 1}[model_type]
    cost = cost_of(model)
    removed = cost.parameters - cost.without([Layer("attn", 1)]).parameters
    assert removed == parameter_count(block.self_attn) + attention_norms * 64


def test_a_norm_that_both_branches_read_stays_with_the_block():
    assert cost_of(build("phi")).blocks[0].shared == 2 * 64


def test_a_mixer_without_keys_is_an_attention_layer_that_attends_to_nothing():
    cost = cost_of(build("mamba2", "meta", num_heads=8, state_size=8, n_groups=1))
    assert cost.blocks[0].attention > 0
    assert cost.blocks[0].width == cost.blocks[0].kv == 0
    assert cost.without([Layer("attn", 1)]).parameters < cost.parameters


@pytest.mark.parametrize("tokens", [32, 128])
def test_flops_agree_with_the_operations_that_run(tokens):
    model = build("llama", "meta", hidden_size=256, intermediate_size=512, head_dim=64)
    model.config._attn_implementation = "eager"
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        model(torch.zeros(2, tokens, dtype=torch.long, device="meta"), logits_to_keep=1)
    cost = cost_of(model)
    upper_half = 2 * 4 * 256 * 4 * (tokens * (tokens - 1) // 2)  # eager attention computes it, then masks it
    assert counter.get_total_flops() == pytest.approx(cost.prefill_flops(2, tokens) + upper_half, rel=0.01)


def test_a_decode_step_reads_weights_once_and_kept_keys_and_values():
    cost = cost_of(build("llama", tie_word_embeddings=False))
    kv = 4 * 2 * 2 * 16
    assert cost.kv_per_token == kv
    assert cost.decode_elements(3, 10) == cost.parameters - 128 * 64 + 3 * 10 * kv
    assert cost.without([Layer("attn", i) for i in (0, 1, 2)]).kv_per_token == kv // 4


def test_a_window_bounds_what_a_layer_keeps_and_sees():
    cost = cost_of(build("gemma2", sliding_window=8))
    assert [block.window for block in cost.blocks] == [8, None, 8, None]
    short, long = cost.decode_flops(1, 8), cost.decode_flops(1, 24)
    assert long - short == 2 * 4 * 64 * 16


def test_the_cost_is_the_same_inside_of_inference_mode():
    kinds = ["sliding_attention", "full_attention"] * 2
    model = build("gemma3_text", sliding_window=8, layer_types=kinds)
    with torch.inference_mode():
        inside = cost_of(model)
    assert inside.blocks == cost_of(model).blocks and inside.kv_per_token > 0


def test_a_token_uses_its_experts_only():
    cost = cost_of(build("mixtral", num_local_experts=8, num_experts_per_tok=2))
    expert = 3 * 64 * 96
    assert cost.parameters - cost.active == 4 * 6 * expert
    assert cost.read(1) == pytest.approx(cost.active - cost.lookup)
    assert cost.read(10_000) == pytest.approx(cost.parameters - cost.lookup)


def test_two_tokens_share_experts_by_chance():
    assert Experts(count=4, used=2, parameters=1).read(2) == pytest.approx(3)


def test_a_model_already_pruned_counts_what_is_left():
    model = build("llama")

    class Nothing(nn.Module):
        def forward(self, hidden_states, **_):
            return torch.zeros_like(hidden_states), None

    block = model.model.layers[2]
    block.self_attn, block.input_layernorm = Nothing(), nn.Identity()
    assert cost_of(model) == cost_of(build("llama")).without([Layer("attn", 2)])


def test_a_model_that_drop_returns_counts_what_is_left():
    model = build("llama")
    plan = api.plan_unscored(ModelRef(name="tiny"), api.outline(model), "attn=0,2,mlp=3", (), None)
    pruned = dropformer.drop(model, plan)
    assert cost_of(pruned) == cost_of(build("llama")).without(plan.layers)


def test_a_block_without_its_branches_is_dropped_whole():
    cost = cost_of(build("phi"))  # its blocks have a norm that belongs to neither branch
    by_branches = cost.without([Layer("attn", 1), Layer("mlp", 1)])
    assert by_branches == cost.without([Layer("block", 1)])
    assert len(by_branches.blocks) == 3


def test_a_drop_that_the_model_does_not_have_is_refused():
    with pytest.raises(PlanError):
        cost_of(build("llama", "meta")).without([Layer("attn", 4)])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ArchitectureError, match="does not run"):
        cost_of(nn.Linear(2, 2))
