"""Attention layers that see a window: the masks, the caches, and the checkpoint."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from dropformer import api
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import PlanError
from dropformer.prune.loading import window_attention
from dropformer.prune.loading.parts import continued, empty_cache

WIDTH, SINKS = 5, 2
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def windowed(dense, spec=f"window=0,2@{WIDTH}+{SINKS}"):
    outline = api.outline(dense)
    return api.drop(dense, api.plan_unscored(ModelRef(name="tiny"), outline, spec, (), None))


def by_hand(dense, ids, layers, real):
    """Logits with an explicit mask in each layer, nothing cached."""
    first = real.int().argmax(1)[:, None, None]
    q, k = torch.arange(ids.shape[1])[None, :, None], torch.arange(ids.shape[1])[None, None]
    seen = (k <= q) & (k >= first) & ((q - k < WIDTH) | (k < first + SINKS))
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    hooks = [
        dense.model.layers[i].self_attn.register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
        for i in layers
    ]
    with torch.no_grad():
        logits = dense(ids, attention_mask=real.long(), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("band", [2, 256])
def test_a_window_is_the_mask_that_it_says_padded_rows_too(tiny, batch, monkeypatch, band, attention):
    monkeypatch.setattr(window_attention, "BAND", band)
    ids, real = batch
    dense = tiny("llama", initializer_range=0.3, attn_implementation=attention)
    want, plain = by_hand(dense, ids, (0, 2), real), dense(ids, attention_mask=real.long()).logits
    with torch.no_grad():
        got = windowed(dense)(ids, attention_mask=real.long(), use_cache=False).logits
    torch.testing.assert_close(got[real], want[real], atol=2e-5, rtol=1e-4)
    assert (plain - want)[real].abs().max() > 0.1


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_chunks_and_single_tokens_through_a_cache_give_what_no_cache_gives(tiny, batch, kind, family):
    ids, real = batch
    dense = tiny(family, initializer_range=0.3)
    model, want = windowed(dense), by_hand(dense, ids, (0, 2), real)
    cache = kind(config=model.config, **({"max_cache_len": 40} if kind is StaticCache else {}))
    found, at = [], 0
    with torch.no_grad():
        for n in (4, 7, 1, 1, 6, 1, 1, 1, 1):
            places = torch.arange(at, at + n).expand(2, -1)
            mask = real[:, : at + n].long()
            chunk = ids[:, at : at + n]
            found.append(model(chunk, attention_mask=mask, past_key_values=cache, position_ids=places).logits)
            at += n
    torch.testing.assert_close(torch.cat(found, 1)[real], want[real], atol=5e-5, rtol=1e-3)
    held = [
        layer.keys.shape[2] + (SINKS if kind is DynamicCache else 0) for layer in (cache.layers[0], cache.layers[2])
    ]
    assert max(held) <= WIDTH + SINKS < cache.layers[1].keys.shape[2]


@pytest.mark.parametrize("spec", [f"window=0,2@{WIDTH}+{SINKS}", f"window=0,2@{WIDTH}", "window=0@1,window=2@1+2"])
def test_single_tokens_beyond_the_window_are_written_in_place_and_copies_of_the_cache_part_ways(tiny, spec):
    model, ids = windowed(tiny("llama", initializer_range=0.3), spec), torch.arange(3, 33)[None]
    with torch.inference_mode():
        want, cache = model(ids, use_cache=False).logits, empty_cache(model)
        model(ids[:, :12], past_key_values=cache)
        found = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, 18)]
        places = [layer.keys.untyped_storage().data_ptr() for layer in (cache.layers[0], cache.layers[2])]
        found += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(18, 24)]
        assert places == [layer.keys.untyped_storage().data_ptr() for layer in (cache.layers[0], cache.layers[2])]
        copied = continued(cache)
        model(ids[:, :1], past_key_values=copied)
        model(ids[:, 4:5], past_key_values=copied)
        found += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(24, 27)]
    with torch.no_grad():  # tensors of inference mode are not written outside of it
        found += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(27, 30)]
    torch.testing.assert_close(torch.cat(found, 1), want[:, 12:], atol=5e-5, rtol=1e-3)


def test_every_way_of_generating_gives_what_no_cache_gives(tiny):
    dense, other = tiny("llama", initializer_range=0.3), tiny("llama", initializer_range=0.2)
    model = windowed(dense, f"attn=1,window=0,2@{WIDTH}+{SINKS}")
    ids = torch.randint(3, 64, (1, 11), generator=torch.Generator().manual_seed(4))
    want = model.generate(ids, use_cache=False, **GREEDY)
    ways = [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": other},
    ]
    for way in ways:
        assert torch.equal(model.generate(ids, **way, **GREEDY), want), way
    beams = model.generate(ids, num_beams=3, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, num_beams=3, **GREEDY), beams)
    assert torch.equal(dense.generate(ids, assistant_model=model, **GREEDY), dense.generate(ids, **GREEDY))
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)
    mask = (padded > 0).long()
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 6:], want)


def test_a_checkpoint_with_windows_loads_as_it_was_with_and_without_dropformer(tiny, tmp_path, here, elsewhere):
    dense = tiny("llama", initializer_range=0.3)
    dense.save_pretrained(tmp_path / "dense")
    opened = api.open_model(tmp_path / "dense")
    outline = api.outline(opened.model)
    spec = "attn=3,window=1,2@5+2"
    plan = api.plan_unscored(opened.ref, outline, spec, (), None)
    model = api.drop(opened, plan)
    api.save(model, tmp_path / "out")
    ids = torch.arange(3, 33)[None]
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, want)
    record = json.loads((tmp_path / "out" / "dropformer.json").read_text())
    assert record["windows"] == {"attn:1": "5+2", "attn:2": "5+2"}
    assert record["after"]["kv_bytes_per_token"] * 4 == record["before"]["kv_bytes_per_token"]
    torch.save(want, tmp_path / "want.pt")
    code = (
        "import torch; from transformers import AutoModelForCausalLM as A;"
        "m = A.from_pretrained('out', trust_remote_code=True);"
        "torch.testing.assert_close(m(torch.arange(3, 33)[None]).logits, torch.load('want.pt'))"
    )
    run = elsewhere(code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_module_that_takes_no_window_is_refused_with_the_reason(tiny):
    with pytest.raises(PlanError, match="attn:0: FalconAttention does not compute attention through"):
        windowed(tiny("falcon"))
    with pytest.raises(PlanError, match="has a sliding window already"):
        windowed(tiny("gemma3_text", sliding_window=4, layer_types=["sliding_attention"] * 3 + ["full_attention"]))


def test_a_cache_that_another_model_filled_is_read_through_the_window(tiny, batch):
    ids, _ = batch
    dense = tiny("llama", initializer_range=0.3)
    model, cache = windowed(dense, f"window=0,1,2,3@{WIDTH}+{SINKS}"), DynamicCache()
    with torch.no_grad():
        dense(ids[:, :20], past_key_values=cache)
        model(ids[:, 20:21], past_key_values=cache)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * 4


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "lfm2", "qwen3_next"])
def test_a_continued_cache_leaves_the_one_behind_it_alone(tiny, ids, family):
    """Linear attention and convolutions write their states in place; keys and values are joined to new ones."""
    model = tiny(family)
    cache = empty_cache(model)
    with torch.no_grad():
        model(ids[:, :-3], past_key_values=cache, use_cache=True)
        answers = [
            model(ids[:, -3:], past_key_values=continued(cache), use_cache=True).logits.clone() for _ in range(2)
        ]
    torch.testing.assert_close(answers[0], answers[1], atol=0, rtol=0)
    torch.testing.assert_close(answers[0], model(ids).logits[:, -3:], atol=1e-5, rtol=1e-5)


def test_an_attention_whose_window_stands_in_the_config_alone_takes_no_other(tiny):
    assert "has a sliding window already" in window_attention.unfit(tiny("mistral").model.layers[1].self_attn)
    assert not window_attention.unfit(tiny("mistral", sliding_window=None).model.layers[1].self_attn)
    assert not window_attention.unfit(tiny("gpt2").transformer.h[1].attn)
