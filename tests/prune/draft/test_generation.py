"""A draft of the dense model itself: the same text, the same tensors, the same cache."""

import pytest
import torch
from transformers import StaticCache

import dropformer
from dropformer import api
from dropformer.eval.cost.memory import parameter_bytes
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import ModelError, OutputError, PlanError

GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SPECS = ["block=1", "window=0,2@6+2", "attn=1,window=0,3@6+2"]
FAMILIES = ["qwen3", "gemma3_text", "gpt_neox", "cohere", "falcon"]  # falcon's own code asks whether it has sdpa


def plan(dense, spec):
    return api.plan_unscored(ModelRef(name="tiny"), api.outline(dense), spec, (), None)


def drafted(dense, spec, tokens=3):
    return dropformer.draft(dense, plan(dense, spec), tokens)


def some_ids(length, seed=0):
    return torch.randint(3, 16, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama(tiny):
    return tiny("llama", initializer_range=0.3)


@pytest.mark.parametrize("spec", SPECS)
def test_the_text_is_the_dense_models_own_with_either_cache(llama, spec):
    draft, prompt = drafted(llama, spec), some_ids(17)
    want, counts = llama.generate(prompt, **GREEDY), []
    assert torch.equal(llama.generate(prompt, assistant_model=draft, **GREEDY), want)
    shared = dropformer.speculate_with(draft, counts)
    assert torch.equal(llama.generate(prompt, custom_generate=shared, **GREEDY), want)
    assert sum(accepted + 1 for _, accepted in counts) == 16 and max(count for count, _ in counts) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_families_keep_their_text(tiny, family):
    dense = tiny(family, initializer_range=0.3)
    draft, prompt = drafted(dense, "attn=1"), some_ids(40)
    want = dense.generate(prompt, **GREEDY)
    assert torch.equal(dense.generate(prompt, assistant_model=draft, **GREEDY), want)
    assert torch.equal(dense.generate(prompt, custom_generate=dropformer.speculate_with(draft), **GREEDY), want)


def test_a_left_padded_prompt_keeps_its_text(llama):
    draft, real = drafted(llama, "mlp=1,window=0,2@6+2"), torch.ones(1, 30, dtype=torch.long)
    real[:, :11] = 0
    want = llama.generate(some_ids(30), attention_mask=real, **GREEDY)
    for way in ({"assistant_model": draft}, {"custom_generate": dropformer.speculate_with(draft)}):
        assert torch.equal(llama.generate(some_ids(30), attention_mask=real, **way, **GREEDY), want)


def test_where_every_draft_is_accepted_a_round_gives_one_token_more_than_was_drafted(llama):
    draft, counts = drafted(llama, "window=0@200+2"), []
    llama.generate(some_ids(9), custom_generate=dropformer.speculate_with(draft, counts), **GREEDY)
    assert counts == [(0, 0), *[(3, 3)] * 3, (2, 2)]  # a token after the prompt, then four a round, 16 in all


def test_the_draft_shares_every_tensor_and_leaves_the_dense_model_as_it_was(llama):
    before = {name: type(module) for name, module in llama.named_modules()}
    settings = llama.generation_config.to_dict()
    draft = drafted(llama, "attn=1,window=0,2@6+2")
    own = {id(p) for p in llama.parameters()}
    assert all(id(p) in own for p in draft.parameters())
    assert parameter_bytes(torch.nn.ModuleList([llama, draft])) == parameter_bytes(llama)
    assert {name: type(module) for name, module in llama.named_modules()} == before
    assert llama.generation_config.to_dict() == settings and not llama._forward_pre_hooks


def test_a_view_of_the_cache_holds_a_windows_tokens_and_leaves_the_dense_models_alone(llama):
    from dropformer.prune.draft.shared_cache import view_of

    draft = drafted(llama, "attn=1,window=0,2@6+2")
    with torch.no_grad():
        cache = llama(some_ids(40), use_cache=True).past_key_values
        kept = [entry.keys.clone() for entry in cache.layers]
        view = view_of(cache, draft, range(4))
        draft(some_ids(1), past_key_values=view)
    assert view.layers[0].keys.shape[2] == 6 and view.layers[0].sink_keys.shape[2] == 2
    assert view.layers[3].keys.shape[2] == 41
    assert all(torch.equal(entry.keys, old) for entry, old in zip(cache.layers, kept, strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_samples_follow_the_dense_models_distribution(tiny, shared):
    """The surprise -log p(x) of a text drawn from p is the entropy of p on average: a z that stays small for the dense
    model's p, and does not for the draft's."""
    dense = tiny("llama", initializer_range=0.4, vocab_size=16, num_hidden_layers=2)
    draft = drafted(dense, "mlp=1")
    way = {"custom_generate": dropformer.speculate_with(draft)} if shared else {"assistant_model": draft}
    torch.manual_seed(0)
    how = {"max_new_tokens": 100, "do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    text = dense.generate(some_ids(5), **way, **how)
    with torch.no_grad():
        own, other = (
            _surprise(model(text[:, :-1]).logits[0, 4:].log_softmax(-1), text[0, 5:]) for model in (dense, draft)
        )
    assert abs(own) < 3 < other


def _surprise(log_p, drawn):
    p, of_each = log_p.exp(), -log_p
    entropy = (p * of_each).sum(1)
    variance = (p * of_each.square()).sum(1) - entropy.square()
    return float((of_each.gather(1, drawn[:, None])[:, 0] - entropy).sum() / variance.sum().sqrt())


def test_a_cache_of_more_than_keys_and_values_is_not_shared(tiny):
    from dropformer.prune.draft.shared_cache import recording_cache, view_of

    hybrid = tiny("lfm2", layer_types=["conv", "full_attention"] * 2)
    with pytest.raises(ModelError, match="cannot share a cache of LinearAttentionLayer"):
        recording_cache(hybrid)
    with torch.no_grad(), pytest.raises(ModelError, match="cannot share a cache of LinearAttentionLayer"):
        view_of(hybrid(some_ids(9), use_cache=True).past_key_values, drafted(hybrid, "mlp=1"), range(4))


def test_what_cannot_be_drafted_is_refused(llama, tiny):
    draft = drafted(llama, "attn=1")
    shared = dropformer.speculate_with(draft)
    with pytest.raises(ValueError, match="batch_size = 1"):  # transformers' own limit, either way
        llama.generate(some_ids(9).expand(2, -1), custom_generate=shared, **GREEDY)
    with pytest.raises(ValueError, match="Static cache"):
        llama.generate(some_ids(9), past_key_values=StaticCache(llama.config, 40), custom_generate=shared, **GREEDY)
    with pytest.raises(OutputError, match="drop"):
        dropformer.speculate_with(llama)
    with pytest.raises(ModelError, match="generates no text"):
        dropformer.draft(llama.model, plan(llama.model, "attn=1"))
    with pytest.raises(PlanError, match="one token a round or more, and tokens is 0"):
        drafted(llama, "attn=1", tokens=0)
