import pytest
import torch
from torch import nn
from transformers import (
    Cache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from dropformer.eval.cost.memory import (
    kv_bytes,
    kv_bytes_per_token,
    layer_kv_bytes_per_token,
    parameter_bytes,
    parameter_count,
    peak_of,
    state_bytes,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def llama(**more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | more))).eval()


@torch.inference_mode()
def prefilled(model, batch, length, **more):
    ids = torch.ones(batch, length, dtype=torch.long)
    return model(ids, use_cache=True, **more).past_key_values


def test_kv_bytes_are_two_tensors_of_every_kept_head_and_token():
    # key and value, layers, batch x heads x tokens x head size, float32
    cache = prefilled(llama(), batch=2, length=5)
    assert kv_bytes(cache) == 2 * 3 * (2 * 2 * 5 * 8) * 4


def test_a_dropped_attention_layer_holds_no_kv_bytes():
    model = llama()
    model.config.layer_types = ["full_attention", "moe", "full_attention"]  # "moe" is a DummyLayer

    class Nothing(nn.Module):
        def forward(self, hidden_states, **_):
            return torch.zeros_like(hidden_states), None

    model.model.layers[1].self_attn = Nothing()
    assert layer_kv_bytes_per_token(model) == [128, 0, 128]
    assert kv_bytes(prefilled(model, 1, 4)) == 2 * 4 * 128


def test_a_static_cache_counts_all_it_has_reserved():
    model = llama()
    cache = StaticCache(config=model.config, max_cache_len=32)
    prefilled(model, 1, 4, past_key_values=cache)
    assert kv_bytes(cache) == 3 * 128 * 32


def test_layers_with_a_window_shorter_than_the_prefill_add_nothing_per_token():
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=8, sliding_window=8)
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert layer_kv_bytes_per_token(Gemma2ForCausalLM(config).eval()) == [0, 128, 0]


def test_kv_bytes_per_token_needs_no_weights():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert kv_bytes_per_token(model) == kv_bytes_per_token(llama()) == 3 * 128


def test_a_model_without_a_cache_keeps_nothing_per_token():
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32)
    assert kv_bytes_per_token(ViTModel(config)) == 0


def test_an_encoder_decoder_keeps_keys_of_both_its_attentions():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    assert kv_bytes_per_token(model) == 2 * 2 * (2 * 4 * 8) * 4  # layers, self and cross, key and value, float32


def test_the_state_of_linear_attention_is_counted_apart_from_kv():
    cache = Cache(layers=[LinearAttentionLayer(), DynamicLayer()])
    cache.update_conv_state(torch.zeros(1, 4, 3), layer_idx=0)
    cache.update_recurrent_state(torch.zeros(1, 2, 4, 4), layer_idx=0)
    cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), layer_idx=1)
    assert state_bytes(cache) == 4 * (12 + 32)
    assert kv_bytes(cache) == 4 * 2 * 80


def test_tied_parameters_are_counted_once():
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    assert parameter_count(untied) - parameter_count(tied) == 64 * 32
    assert parameter_bytes(tied) == 4 * parameter_count(tied)


def test_the_peak_includes_memory_that_was_freed_before_the_end():
    def work():
        return torch.ones(48 * 2**20 // 4).mul_(2).sum().item()

    work()
    total, peak = peak_of(work)
    assert total == 2 * 48 * 2**20 // 4
    if peak.source == "rss":
        assert 40 * 2**20 < peak.nbytes < 96 * 2**20
    else:
        pytest.skip("this system reports only the lifetime's peak")
