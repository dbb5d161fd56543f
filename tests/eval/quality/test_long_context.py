"""Perplexity by position, and facts asked for again from five depths."""

import copy
import math

import pytest
import torch

from dropformer.eval.quality.long_context import (
    ASKED,
    DEPTHS,
    LongText,
    ask,
    band,
    bands,
    needle,
    read,
    text_tokens,
    with_facts,
)
from dropformer.eval.quality.perplexity import token_losses
from dropformer.prune.errors import EvaluationError


class Words:
    """One token a word, as a tokenizer that needs no file."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [sum(map(ord, word)) % 300 + 3 for word in text.split()]}


@pytest.fixture(scope="module")
def text():
    return with_facts(torch.arange(400, dtype=torch.long) % 7 + 350, Words())


def plain(length):
    return LongText(torch.zeros(length, dtype=torch.long), torch.ones(length, dtype=torch.bool), ())


def test_bands_double_and_end_with_the_text():
    assert bands(300) == [(1, 128), (128, 256), (256, 300)]
    assert bands(60) == [(1, 60)]


def test_a_loss_is_counted_in_the_band_of_its_own_position():
    dense, pruned = torch.zeros(299, dtype=torch.float64), torch.zeros(299, dtype=torch.float64)
    pruned[255] = 44.0  # the token at position 256
    found = [band([plain(300)], [pruned], [dense], *bounds) for bounds in bands(300)]
    assert [one.lost for one in found] == [0.0, 0.0, pytest.approx(1.0)]
    assert found[2].perplexity == pytest.approx(math.e)
    assert band([plain(300)], [dense], None, 1, 128).lost is None


def test_the_facts_own_tokens_count_in_no_band(text):
    losses = torch.where(text.scored, 1.0, 100.0).double()[1:]
    assert band([text], [losses], None, 1, len(text.ids)).perplexity == pytest.approx(math.e)
    told = int((~text.scored).nonzero()[0])
    assert band([text], [losses], None, told, told + 9) is None


def test_the_standard_error_of_a_band_is_over_runs_of_neighbours():
    dense = torch.zeros(128, dtype=torch.float64)
    lost = torch.cat([torch.full((64,), 1.0), torch.full((64,), 3.0)]).double()
    assert band([plain(129)], [lost], [dense], 1, 129).stderr == pytest.approx(1.0)
    assert band([plain(129)], [lost], [dense], 1, 40).stderr is None


def test_facts_lie_at_five_depths_of_a_text_whose_own_tokens_are_all_there(text):
    assert torch.equal(text.ids[text.scored], torch.arange(400) % 7 + 350)
    begins = (text.scored[:-1] & ~text.scored[1:]).nonzero().flatten() + 1
    before = [int(text.scored[:at].sum()) / 400 for at in begins]
    assert before == [0.1, 0.3, 0.5, 0.7, 0.9] and len(text.facts) == DEPTHS * ASKED
    told = text.ids[~text.scored].view(DEPTHS, ASKED, -1)
    assert torch.equal(told[4, 0, :-1], text.facts[4 * ASKED].question)


def test_too_few_tokens_for_the_facts_are_refused():
    with pytest.raises(EvaluationError, match="give more"):
        text_tokens(300, Words())


def test_one_pass_gives_every_loss_and_a_cache_that_questions_leave_alone(tiny, text):
    model = tiny.llama(max_position_embeddings=1024)
    losses, cache = read(model, text)
    torch.testing.assert_close(losses, token_losses(model, text.ids[None])[0], atol=1e-5, rtol=1e-5)
    keys = copy.deepcopy(cache.layers[0].keys)
    answers = ask(model, text, cache)
    assert torch.equal(cache.layers[0].keys, keys) and len(answers) == len(text.facts)
    fact = text.facts[7]
    whole = torch.cat([text.ids, fact.question, fact.answer])[None]
    with torch.no_grad():
        logits = model(whole).logits[0, -len(fact.answer) - 1 : -1]
    logprob = logits.log_softmax(-1).gather(1, fact.answer[:, None]).sum()
    assert answers[7][0] == pytest.approx(float(logprob), abs=1e-4)
    assert answers[7][1] == pytest.approx(float((logits.argmax(-1) == fact.answer).float().mean()))


def test_the_needle_is_the_share_of_answers_told_by_depth_and_of_their_tokens():
    one = [(-1.0, 1.0 if i < 2 * ASKED else 0.5) for i in range(DEPTHS * ASKED)]
    found = needle([one, [(-3.0, 0.0)] * len(one)])
    assert found.accuracy == pytest.approx(0.2) and found.logprob == pytest.approx(-2.0)
    assert found.by_depth == (0.5, 0.5, 0.0, 0.0, 0.0) and found.facts == 60
    assert found.tokens == pytest.approx((12 + 18 * 0.5) / 60) and found.tokens_stderr > 0


def test_a_token_that_every_answer_begins_with_is_part_of_the_question():
    class Letters:
        def __call__(self, text, **_):
            return {"input_ids": [ord(letter) for letter in text]}

    text = with_facts(torch.arange(2000) + 300, Letters())
    assert all("".join(map(chr, fact.answer.tolist())).isdigit() for fact in text.facts)
    assert all(fact.question[-1] == ord(" ") for fact in text.facts)
