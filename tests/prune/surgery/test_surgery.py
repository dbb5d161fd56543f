"""A cut model computes what the dense one does with the branches zeroed, at no cost and with no cache."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from dropformer.prune.architecture import Layer
from dropformer.prune.choosing import choose
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "phi3"]


def pruned(model, spec):
    outline = summarize(model, discover(model))
    copied = copy.deepcopy(model)
    surgery = plan_surgery(outline, choose(outline, spec), copied)
    return apply_surgery(copied, surgery), surgery


def zeroed(model, layers: list[Layer]):
    """The dense model whose dropped branches end in zeros: exactly a drop, written independently."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers:
            block = copied.model.layers[layer.index]
            if layer.kind in ("attn", "block"):
                block.self_attn.o_proj.weight.zero_()
            if layer.kind in ("mlp", "block"):
                experts = getattr(block.mlp, "experts", None)
                (block.mlp.down_proj.weight if experts is None else experts.down_proj).zero_()
    return copied


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", ["attn=0,2", "mlp=1", "block=1,2", "mlp=1,attn=2", "attn=1,block=2"])
def test_dropping_equals_zeroing_the_branch(tiny, ids, family, spec):
    model = tiny(family)
    small, surgery = pruned(model, spec)
    want = zeroed(model, list(surgery.layers))(ids).logits
    torch.testing.assert_close(small(ids).logits, want, rtol=1e-5, atol=1e-5)


def test_a_repaired_tensor_keeps_the_dtype_of_the_one_that_it_replaces(tiny):
    model = tiny("llama").to(torch.bfloat16)
    outline = summarize(model, discover(model))
    model.model.layers[3].input_layernorm.float()
    surgery = plan_surgery(outline, choose(outline, "attn=1"), model)
    names = ["model.layers.3.input_layernorm.weight", "model.layers.3.mlp.up_proj.weight"]
    new = {name: torch.ones_like(model.get_parameter(name), dtype=torch.float32) for name in names}
    small = apply_surgery(copy.deepcopy(model), replace(surgery, tensors=new))
    assert [small.get_parameter(name).dtype for name in names] == [torch.float32, torch.bfloat16]


def test_dropped_parameters_are_gone(tiny):
    model = tiny("llama")
    small, surgery = pruned(model, "attn=0,2,mlp=1")
    gone = surgery.outline.dropped_parameters(surgery.layers)
    assert gone > 0
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in model.parameters()) - gone


def test_whole_blocks_and_repaired_pairs_become_a_stock_model(tiny):
    for spec, blocks in (("block=1,2", 2), ("mlp=1,attn=2", 3), ("mlp=0,attn=1,block=3", 2)):
        small, surgery = pruned(tiny("llama"), spec)
        assert surgery.block_map.packed
        assert type(small).__name__ == "LlamaForCausalLM"
        assert small.config.num_hidden_layers == len(small.model.layers) == blocks
        assert [layer.self_attn.layer_idx for layer in small.model.layers] == list(range(blocks))


def test_parallel_blocks_do_not_pair_across_blocks(tiny, ids):
    small, surgery = pruned(tiny("phi"), "mlp=1,attn=2")
    assert not surgery.block_map.packed
    assert small.config.num_hidden_layers == 4


def test_layer_types_follow_a_shortened_stack(tiny, ids):
    model = tiny(
        "gemma3_text", layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    )
    small, surgery = pruned(model, "block=0,3")
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    assert surgery.block_map.packed


def test_a_block_that_depends_on_its_position_stays_as_an_empty_one(tiny, ids):
    model = tiny("deepseek_v3", qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, q_lora_rank=16, kv_lora_rank=16,
                 n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=2,
                 n_group=2, topk_group=1, num_key_value_heads=4)  # fmt: skip
    small, _ = pruned(model, "block=0")
    assert small.config.first_k_dense_replace == 1
    torch.testing.assert_close(small(ids).logits, zeroed_deepseek(model)(ids).logits, rtol=1e-5, atol=1e-5)


def zeroed_deepseek(model):
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.layers[0].self_attn.o_proj.weight.zero_()
        copied.model.layers[0].mlp.down_proj.weight.zero_()
    return copied


@pytest.mark.parametrize("spec", ["attn=0", "attn=0,1,3", "mlp=0,attn=3"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text"])
class TestGeneration:
    """Everything that asks layer 0's cache for a length, with layer 0's attention gone."""

    def make(self, tiny, family, spec):
        window = {"sliding_window": 6} if family in ("mistral", "gemma3_text") else {}
        return pruned(tiny(family, **window), spec)[0]

    def test_dropped_layers_hold_no_cache(self, tiny, ids, family, spec):
        small = self.make(tiny, family, spec)
        layers = small(ids, use_cache=True).past_key_values.layers
        held = [i for i, layer in enumerate(layers) if layer.keys is not None]
        assert held == [i for i in range(4) if f"{i}" not in spec.partition("attn=")[2].split(",")]

    @pytest.mark.parametrize("beams", [1, 3])
    def test_cached_equals_uncached(self, tiny, ids, family, spec, beams):
        small = self.make(tiny, family, spec)
        fields = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        assert torch.equal(small.generate(ids, **fields), small.generate(ids, use_cache=False, **fields))

    def test_left_padding_changes_nothing(self, tiny, ids, family, spec):
        small = self.make(tiny, family, spec)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        padded = ids.masked_fill(mask == 0, 0)
        both = small.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
        alone = small.generate(ids[:1, 5:], max_new_tokens=6, do_sample=False)
        assert torch.equal(both[0, 12:], alone[0, 7:])

    def test_static_cache_equals_dynamic(self, tiny, ids, family, spec):
        small = self.make(tiny, family, spec)
        want = small.generate(ids, max_new_tokens=6, do_sample=False)
        cache = StaticCache(config=small.config, max_cache_len=20)
        assert torch.equal(small.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache), want)

    def test_chunked_prefill_equals_one_pass(self, tiny, ids, family, spec):
        small = self.make(tiny, family, spec)
        cache = DynamicCache(config=small.config)
        with torch.no_grad():
            parts = [small(part, past_key_values=cache).logits for part in ids.split(5, dim=1)]
            want = small(ids, use_cache=False).logits
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-4)

    def test_prompt_lookup_equals_greedy(self, tiny, ids, family, spec):
        small = self.make(tiny, family, spec)
        prompt = torch.cat([ids[:1], ids[:1]], 1)
        want = small.generate(prompt, max_new_tokens=8, do_sample=False)
        assert torch.equal(small.generate(prompt, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3), want)


def test_any_other_module_has_its_branches_replaced():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn_norm, self.ffn_norm = nn.LayerNorm(16), nn.LayerNorm(16)
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
            self.ffn = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x):
            h = self.attn_norm(x)
            x = x + self.attn(h, h, h, need_weights=False)[0]
            return x + self.ffn(self.ffn_norm(x))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Encoder().eval(), torch.randn(2, 5, 16)
    outline = summarize(model, discover(model, {"x": x}))
    from dropformer.prune.block_map import Surgery, map_blocks

    layers = choose(outline, "block=1")
    small = apply_surgery(
        copy.deepcopy(model), Surgery(outline, tuple(layers), map_blocks(outline, layers, shorten=False))
    )
    want = model.blocks[2](model.blocks[0](x))
    torch.testing.assert_close(small(x), want)
