import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import dropformer
from dropformer import api
from dropformer.eval.cost.memory import kv_bytes
from dropformer.eval.cost.sinks import Sinks, key_rotations, sink_cache
from dropformer.eval.cost.streaming import stream, streaming_speed
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import ArchitectureError, EvaluationError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT = torch.randint(3, 64, (120,), generator=torch.Generator().manual_seed(1))


def build(model_type="llama", **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | more))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


class Nothing(nn.Module):
    def forward(self, hidden_states, **_):
        return torch.zeros_like(hidden_states), None


def pruned(*dropped):
    model = build()
    model.config.layer_types = ["moe" if i in dropped else "full_attention" for i in range(3)]  # no cache entry
    for index in dropped:
        model.model.layers[index].self_attn = Nothing()
    return model


@torch.inference_mode()
def read(model, ids, cache, chunk):
    """Logits [T, V] of reading ids [T] through `cache`, a chunk at a time."""
    steps = [model(ids[None, i : i + chunk], past_key_values=cache, use_cache=True) for i in range(0, len(ids), chunk)]
    return torch.cat([step.logits[0] for step in steps])


FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "phi": {"partial_rotary_factor": 0.5},
    "cohere": {},
    "nanochat": {},
    "gptj": {"rotary_dim": 8, "n_inner": 96},
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7])
def test_a_window_longer_than_the_text_changes_nothing(family, chunk):
    model = build(family, **FAMILIES[family])
    plain = read(model, TEXT[:40], DynamicCache(config=model.config), chunk)
    streamed = read(model, TEXT[:40], sink_cache(model, Sinks(4, 36 + chunk, chunk)), chunk)
    assert (plain - streamed).abs().max() < 1e-5


def test_evicting_equals_computing_the_kept_tokens_alone_in_one_layer():
    # keys and values of a single layer depend on their own token only, so the definition can be computed outright
    model = build(num_hidden_layers=1)
    streamed = read(model, TEXT[:50], sink_cache(model, Sinks(sinks=4, window=8, chunk=1)), chunk=1)
    for end in (13, 30, 50):
        kept = torch.cat([TEXT[:4], TEXT[end - 8 : end]])
        with torch.inference_mode():
            alone = model(kept[None]).logits[0, -1]
        assert (streamed[end - 1] - alone).abs().max() < 1e-5


def test_a_chunk_sees_the_sinks_and_the_window_before_its_end():
    model = build(num_hidden_layers=1)
    streamed = read(model, TEXT[:48], sink_cache(model, Sinks(sinks=2, window=9, chunk=4)), chunk=4)
    kept = torch.cat([TEXT[:2], TEXT[48 - 9 : 48]])
    with torch.inference_mode():
        alone = model(kept[None]).logits[0, -4:]
    assert (streamed[-4:] - alone).abs().max() < 1e-5


def test_deep_layers_keep_the_unrotated_keys_of_the_kept_tokens():
    model, keys = build(), {0: [], 1: [], 2: []}
    cache = sink_cache(model, Sinks(sinks=4, window=8, chunk=1))
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.register_forward_hook(lambda _, __, out, index=index: keys[index].append(out))
    read(model, TEXT[:40], cache, chunk=1)
    for index in keys:
        plain = torch.cat(keys[index], dim=1).view(1, 40, 2, 16).transpose(1, 2)
        expected = torch.cat([plain[:, :, :4], plain[:, :, 33:]], dim=2)  # room is left for the next token
        assert (cache.layers[index].keys - expected).abs().max() < 1e-5


def test_memory_stays_constant_however_long_the_text():
    model, shape = build(), Sinks(sinks=4, window=16, chunk=4)
    short, long = stream(model, TEXT[:40], shape), stream(model, TEXT, shape)
    assert short.cache_bytes == long.cache_bytes == 3 * 2 * 2 * 16 * 4 * (4 + 16 - 4)
    everything = DynamicCache(config=model.config)
    read(model, TEXT[:119], everything, 4)
    assert kv_bytes(everything) == 3 * 2 * 2 * 16 * 4 * 119


@pytest.mark.parametrize("dropped", [(1,), (0,), (0, 2)])
def test_a_pruned_model_streams_and_its_dropped_layers_hold_nothing(dropped):
    model = pruned(*dropped)
    cache = sink_cache(model, Sinks(4, 64, 8))
    plain = read(model, TEXT[:40], DynamicCache(config=model.config), 8)
    assert (read(model, TEXT[:40], cache, 8) - plain).abs().max() < 1e-5
    assert kv_bytes(cache) == (3 - len(dropped)) * 2 * 2 * 16 * 4 * 40


def test_a_model_that_drop_returns_streams_as_it_reads():
    model = build()
    plan = api.plan_unscored(ModelRef(name="tiny"), api.outline(model), "attn=0,2", (), None)
    model = dropformer.drop(model, plan)
    plain = read(model, TEXT[:40], DynamicCache(config=model.config), 8)
    cache = sink_cache(model, Sinks(4, 64, 8))
    assert (read(model, TEXT[:40], cache, 8) - plain).abs().max() < 1e-5
    assert kv_bytes(cache) == 2 * 2 * 16 * 4 * 40


def test_a_text_within_the_window_is_scored_as_in_one_forward_pass():
    model = build()
    result = stream(model, TEXT[:50], Sinks(4, 60, 5))
    with torch.inference_mode():
        logits = model(TEXT[None, :50]).logits[0, :-1]
    assert result.nll == pytest.approx(nn.functional.cross_entropy(logits, TEXT[1:50]).item(), abs=1e-5)
    assert result.tokens == 49 and len(result.segments) == 16


def test_learned_positions_are_refused_with_the_reason():
    model = build("gpt2", n_positions=64)
    with pytest.raises(ArchitectureError, match="the keys of layer 0 do not rotate"):
        sink_cache(model, Sinks())


def test_positions_that_the_model_counts_itself_are_refused():
    # its keys ignore position_ids, which would pass for a model without positions
    model = build("roformer", is_decoder=True, embedding_size=64)
    with pytest.raises(ArchitectureError, match="not those it counts itself"):
        sink_cache(model, Sinks())


def test_positions_hidden_in_cached_values_are_refused():
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    model = build("deepseek_v3", **sizes, n_routed_experts=4, num_key_value_heads=4, n_group=1, topk_group=1)
    with pytest.raises(ArchitectureError, match="the values of layer 0"):
        sink_cache(model, Sinks())


def test_a_layer_without_positions_is_told_from_the_rotated_ones():
    rotations = key_rotations(build("smollm3", no_rope_layers=[1, 0, 1]))
    assert [rotations[i].pairing for i in range(3)] == ["half", "none", "half"]


def test_interleaved_rotation_is_told_from_rotation_by_halves():
    assert key_rotations(build("cohere"))[0].pairing == "interleaved"


def test_a_window_shorter_than_a_chunk_is_refused():
    with pytest.raises(EvaluationError, match="chunk <= window"):
        Sinks(window=4, chunk=8)


def test_a_text_of_one_token_is_refused():
    with pytest.raises(EvaluationError, match=r"expected \[T\]"):
        stream(build(), TEXT[:1], Sinks())


def test_both_ways_are_timed_behind_a_full_window():
    speed = streaming_speed(build(), TEXT, Sinks(4, 60, 1), tokens=3)
    assert speed.streaming > 0
    assert speed.speedup == pytest.approx(speed.recompute / speed.streaming)
    with pytest.raises(EvaluationError, match="too short"):
        streaming_speed(build(), TEXT, Sinks(4, 120, 1))
