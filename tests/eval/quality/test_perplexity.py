import math

import pytest
import torch
import torch.nn.functional as F
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from dropformer.eval.quality import head
from dropformer.eval.quality.head import SplitModel
from dropformer.eval.quality.perplexity import all_side_by_side, perplexity, side_by_side, token_losses
from dropformer.prune.errors import EvaluationError

SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def windows(count: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 131, (count, length), generator=torch.Generator().manual_seed(7))


def test_perplexity_is_that_of_all_logits_at_once(monkeypatch):
    model, ids = llama(), windows()
    monkeypatch.setattr(head, "LOGIT_BYTES", 4 * 131 * 16)  # 16 tokens a piece: two pieces a window
    with torch.no_grad():
        logits = model(ids).logits.double()
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    got = perplexity(model, ids)
    assert got.nll == pytest.approx(float(each.mean()), abs=1e-5)
    assert got.value == pytest.approx(math.exp(float(each.mean())), rel=1e-5)
    assert got.stderr == pytest.approx(float(each.std()) / math.sqrt(3), rel=1e-4)
    assert got.tokens == 3 * 23


def test_kl_is_that_of_all_logits_at_once_and_zero_to_itself(monkeypatch):
    dense, pruned, ids = llama(0), llama(1), windows()
    monkeypatch.setattr(head, "LOGIT_BYTES", 4 * 131 * 16)
    with torch.no_grad():
        p = F.log_softmax(dense(ids).logits.double(), -1)
        q = F.log_softmax(pruned(ids).logits.double(), -1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    got = side_by_side(dense, pruned, ids).divergence
    assert got.value == pytest.approx(float(expected), rel=1e-5)
    assert got.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert got.tokens == 72
    itself = side_by_side(dense, dense, ids).divergence
    assert itself.value == pytest.approx(0, abs=1e-7) and itself.agreement == 1


def test_side_by_side_gives_the_perplexities_of_separate_runs():
    dense, pruned, ids = llama(0), llama(1), windows()
    both = side_by_side(dense, pruned, ids)
    assert both.dense.nll == pytest.approx(perplexity(dense, ids).nll, abs=1e-6)
    assert both.pruned.nll == pytest.approx(perplexity(pruned, ids).nll, abs=1e-6)


def test_all_models_at_once_give_what_each_pair_gives():
    dense, ids = llama(0), windows()
    for alone, together in zip((1, 2), all_side_by_side(dense, [llama(1), llama(2)], ids), strict=True):
        expected = side_by_side(dense, llama(alone), ids)
        assert together.pruned == expected.pruned and together.divergence == expected.divergence


def test_losses_of_some_positions_are_those_of_all_at_these(monkeypatch):
    model, ids = llama(), windows()
    whole = torch.stack(token_losses(model, ids))
    assert whole.shape == (3, 23)
    torch.testing.assert_close(torch.stack(token_losses(model, ids, every=4)), whole[:, ::4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(side_by_side(model, model, ids).losses[0]), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), "embedding"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)), "replay"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**{**SIZES, "initializer_range": 1e-3})), "replay"),
        (lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)), "replay"),
    ],
)
def test_the_head_keeps_what_a_family_does_to_its_logits(make, how):
    torch.manual_seed(0)
    model, ids = make().eval(), windows(1)
    split = SplitModel(model)
    assert split.how == how
    with torch.no_grad():
        got = split.logits(split.hidden(ids, use_cache=False).last_hidden_state)
        torch.testing.assert_close(got, model(ids).logits.float(), rtol=1e-5, atol=1e-6)
    assert not model.base_model._forward_hooks


def test_windows_that_cannot_be_scored_are_refused():
    with pytest.raises(EvaluationError, match="T >= 2"):
        perplexity(llama(), torch.zeros(3, 1, dtype=torch.long))


def test_models_of_two_vocabularies_cannot_be_compared():
    torch.manual_seed(0)
    other = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 140}))
    with pytest.raises(EvaluationError, match="one vocabulary"):
        side_by_side(llama(), other, windows())
