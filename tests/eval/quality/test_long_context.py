"""Perplexity by position, and facts asked for again from five depths."""

import math
from itertools import pairwise

import pytest
import torch

from dropformer.eval.quality.long_context import ASKED, DEPTHS, ask, band, bands, by_position, long_needle
from dropformer.prune.errors import EvaluationError


class Words:
    """One token a word, as a tokenizer that needs no file."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [sum(map(ord, word)) % 60 + 3 for word in text.split()]}


def test_bands_double_and_end_with_the_text():
    assert bands(300) == [(1, 128), (128, 256), (256, 300)]
    assert bands(60) == [(1, 60)]


def test_a_loss_is_counted_in_the_band_of_its_own_position():
    dense = [torch.zeros(299, dtype=torch.float64)]
    pruned = [dense[0].clone()]
    pruned[0][255] = 44.0  # the token at position 256
    found = by_position(pruned, dense)
    assert [one.lost for one in found] == [0.0, 0.0, pytest.approx(1.0)]
    assert found[2].perplexity == pytest.approx(math.e) and by_position(dense)[0].lost is None


def test_the_standard_error_of_a_band_is_over_runs_of_neighbours():
    dense = [torch.zeros(128, dtype=torch.float64)]
    lost = torch.cat([torch.full((64,), 1.0), torch.full((64,), 3.0)]).double()
    assert band([lost], dense, 1, 129).stderr == pytest.approx(1.0)
    assert band([lost], dense, 1, 40).stderr is None


def test_the_needle_fills_its_tokens_with_facts_at_five_depths():
    probe = long_needle(Words(), 900)
    words = probe.shared.split()
    assert 880 < len(words) < 900
    places = [words.index(question.answers[0].strip() + ".") / len(words) for question in probe.questions]
    assert len(places) == DEPTHS * ASKED and places == sorted(places)
    means = [sum(places[i : i + ASKED]) / ASKED for i in range(0, len(places), ASKED)]
    assert all(b - a == pytest.approx(0.2, abs=0.06) for a, b in pairwise(means))
    answers = {question.answers[0] for question in probe.questions}
    assert all(set(question.answers) <= answers and len(set(question.answers)) == 5 for question in probe.questions)
    assert len({question.text for question in probe.questions}) == len(probe.questions)


def test_too_few_tokens_for_the_facts_are_refused():
    with pytest.raises(EvaluationError, match="give more"):
        long_needle(Words(), 300)


def test_asking_leaves_the_text_in_the_cache_and_one_accuracy_a_depth(tiny):
    model = tiny.llama(max_position_embeddings=1024)
    probe = long_needle(Words(), 700)
    needle, cache = ask(model, Words(), probe)
    assert needle.tokens == cache.get_seq_length() == len(probe.shared.split())
    assert sum(needle.by_depth) / DEPTHS == pytest.approx(needle.whole.accuracy)
