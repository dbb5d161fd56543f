import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import dropformer
from dropformer import api
from dropformer.eval.cost.memory import parameter_count
from dropformer.eval.cost.model_cost import Experts, branch_parameters, decoder_blocks, work_of
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
def test_the_parts_of_the_work_add_up_to_the_parameters(model_type):
    model = build(model_type)
    assert work_of(model).parameters == parameter_count(model)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", "qwen3"])
def test_dropping_removes_exactly_the_branch_with_its_norms(model_type):
    model = build(model_type, "meta")
    block = decoder_blocks(model)[1]
    norms = [child for name, child in block.named_children() if "norm" in name]
    attention_norms = {"llama": 1, "qwen3": 1, "gemma2": 2, "olmo2": 1}[model_type]
    expected = parameter_count(block.self_attn) + attention_norms * parameter_count(norms[0])
    assert branch_parameters(model)[1]["attn"] == expected
    work = work_of(model)
    assert work.parameters - work.drop({"attn": {1}}).parameters == expected


def test_a_norm_that_both_branches_read_stays_with_the_block():
    assert branch_parameters(build("phi"))[0]["shared"] == 2 * 64


@pytest.mark.parametrize("tokens", [32, 128])
def test_flops_agree_with_the_operations_that_run(tokens):
    model = build("llama", "meta", hidden_size=256, intermediate_size=512, head_dim=64)
    model.config._attn_implementation = "eager"
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        model(torch.zeros(2, tokens, dtype=torch.long, device="meta"), logits_to_keep=1)
    work = work_of(model)
    upper_half = 2 * 4 * 256 * 4 * (tokens * (tokens - 1) // 2)  # eager attention computes it, then masks it
    assert counter.get_total_flops() == pytest.approx(work.prefill_flops(2, tokens) + upper_half, rel=0.01)


def test_a_decode_step_reads_weights_once_and_kept_keys_and_values():
    work = work_of(build("llama", tie_word_embeddings=False))
    kv = 4 * 2 * 2 * 16
    assert work.kv_per_token == kv
    assert work.decode_elements(3, 10) == work.parameters - 128 * 64 + 3 * 10 * kv
    assert work.drop({"attn": 3}).kv_per_token == kv // 4


def test_a_window_bounds_what_a_layer_keeps_and_sees():
    work = work_of(build("gemma2", sliding_window=8))
    assert [block.window for block in work.blocks] == [8, None, 8, None]
    short, long = work.decode_flops(1, 8), work.decode_flops(1, 24)
    assert long - short == 2 * 4 * 64 * 16


def test_a_token_uses_its_experts_only():
    work = work_of(build("mixtral", num_local_experts=8, num_experts_per_tok=2))
    expert = 3 * 64 * 96
    assert work.parameters - work.active == 4 * 6 * expert
    assert work.read(1) == pytest.approx(work.active - work.lookup)
    assert work.read(10_000) == pytest.approx(work.parameters - work.lookup)


def test_two_tokens_share_experts_by_chance():
    assert Experts(count=4, used=2, parameters=1).read(2) == pytest.approx(3)


def test_a_model_already_pruned_counts_what_is_left():
    model = build("llama")

    class Nothing(nn.Module):
        def forward(self, hidden_states, **_):
            return torch.zeros_like(hidden_states), None

    block = model.model.layers[2]
    block.self_attn, block.input_layernorm = Nothing(), nn.Identity()
    assert work_of(model) == work_of(build("llama")).drop({"attn": {2}})


def test_a_model_that_drop_returns_counts_what_is_left():
    model = build("llama")
    plan = api.plan_unscored(ModelRef(name="tiny"), api.outline(model), "attn=0,2,mlp=3", (), None)
    pruned = dropformer.drop(model, plan)
    assert work_of(pruned) == work_of(build("llama")).drop({"attn": {0, 2}, "mlp": {3}})


def test_a_bare_count_spares_the_last_block_until_nothing_else_is_left():
    work = work_of(build("llama"))
    assert [b.attention == 0 for b in work.drop({"attn": 2}).blocks] == [False, True, True, False]
    assert all(b.attention == 0 for b in work.drop({"attn": 4}).blocks)
    assert len(work.drop({"block": {0, 2}, "mlp": {1}}).blocks) == 2


@pytest.mark.parametrize("drops", [{"attn": 5}, {"attn": {4}}, {"heads": {1}}])
def test_a_drop_that_the_model_does_not_have_is_refused(drops):
    with pytest.raises(PlanError):
        work_of(build("llama", "meta")).drop(drops)


def test_what_has_no_known_name_belongs_to_neither_branch():
    model = build("mamba2", "meta", num_heads=8, state_size=8, n_groups=1)
    counts = branch_parameters(model)[0]
    assert counts["shared"] > 0
    assert counts["attn"] == counts["mlp"] == 0


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ArchitectureError, match="no list of blocks"):
        decoder_blocks(nn.Linear(2, 2))
