"""The table of measured seconds has every layer, and its parts fit into the whole."""

import time

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from dropformer.eval.cost.decoding import layer_latency
from dropformer.prune.architecture import Layer
from dropformer.prune.discovery.discover import discover


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "mixtral"])
def test_every_layer_has_its_seconds_and_together_they_fit_into_a_token(family):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(family, num_hidden_layers=3, vocab_size=64, pad_token_id=0, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    architecture = discover(model)
    found = layer_latency(model, architecture, context=20, steps=3)
    assert set(found.seconds) == {layer for layer in architecture.layers() if layer.kind != "block"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert sum(found.seconds.values()) < 2 * found.total  # medians of each, so not to the last digit


def test_time_spent_in_a_layer_is_that_layers(tiny):
    model = tiny.llama()
    slow = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    inner = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    found = layer_latency(model, discover(model), context=8, steps=3)
    slow.remove(), inner.remove()
    assert found.seconds[Layer("attn", 1)] >= 0.01
    assert found.total >= 0.03


def test_a_context_beyond_the_models_is_cut_and_hooks_are_gone(tiny):
    model = tiny.llama(max_position_embeddings=32)
    layer_latency(model, discover(model), context=2048, steps=3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
