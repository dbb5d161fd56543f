"""Queries that share a key-value head as rows of one head: the same numbers, nothing repeated."""

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dropformer.prune.draft.grouped_queries import grouped_attention, grouped_queries


def step(model, ids, mask=None):
    """Logits of the last three tokens behind a cache of the others."""
    cache = DynamicCache(config=model.config)
    behind = None if mask is None else mask[:, :-3]
    model(input_ids=ids[:, :-3], attention_mask=behind, past_key_values=cache, use_cache=True)
    return model(input_ids=ids[:, -3:], attention_mask=mask, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_the_logits_are_those_of_sdpa_and_the_model_is_as_before(tiny, family, monkeypatch):
    model, calls = tiny(family), []
    ids = torch.randint(3, 16, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._local_mapping,
        "sdpa",
        lambda m, q, *a, **k: calls.append(q.shape[2]) or sdpa(m, q, *a, **k),
    )
    with torch.inference_mode():
        want = step(model, ids), step(model, ids, mask)
        assert calls.count(3) == 2 * model.config.num_hidden_layers
        calls.clear()
        with grouped_queries():
            found = step(model, ids), step(model, ids, mask)
    assert not calls.count(3) and calls.count(37)  # the prompt is read as before
    for one, other in zip(want, found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_bias_by_position_is_left_to_sdpa(tiny):
    def sdpa(module, *given, **more):
        return "sdpa", more["position_bias"]

    heads, mask, bias = torch.zeros(1, 4, 3, 8), torch.ones(1, 1, 3, 9, dtype=torch.bool), torch.zeros(1, 4, 3, 9)
    keys = torch.zeros(1, 2, 9, 8)
    assert grouped_attention(sdpa, None, heads, keys, keys, mask, position_bias=bias) == ("sdpa", bias)


def test_an_error_leaves_sdpa_as_it_was():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError), grouped_queries():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] != before
        raise RuntimeError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] == before
