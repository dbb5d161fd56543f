import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dropformer.eval.quality.cliff import cliff
from dropformer.eval.quality.probes import PROBES, Probe, Question, addition, copying, needle, run_probes, score
from dropformer.prune.errors import EvaluationError
from dropformer.recipes import open_source


class Letters:
    """One token a character, as a tokenizer that needs no file."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) % 126 + 2 for letter in text]}


def llama(layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def plain_score(model, text, answer):
    """Log-likelihood of `answer` after `text`, in one forward pass without a cache."""
    context, whole = (Letters()(t)["input_ids"] for t in (text, text + answer))
    ids = torch.tensor([whole])
    with torch.inference_mode():
        logprobs = model(ids).logits.log_softmax(-1)[0]
    return sum(logprobs[i - 1, whole[i]].item() for i in range(len(context), len(whole)))


def test_answers_score_as_if_each_were_computed_alone():
    model, text, answers = llama(), "a b c d", (" longer", " s", " mid")
    scores = [plain_score(model, "shared " + text, answer) for answer in answers]
    result = score(model, Letters(), Probe("one", "shared ", (Question(text, answers),)))
    assert result.logprob == pytest.approx(scores[0], abs=1e-4)
    assert result.accuracy == (max(scores) == scores[0])


def test_the_likeliest_answer_is_counted_as_right():
    model, text, answers = llama(), "a b c d", [" x", " y", " z", " w"]
    answers.sort(key=lambda answer: -plain_score(model, text, answer))
    for order, accuracy in ((answers, 1.0), (answers[::-1], 0.0)):
        result = score(model, Letters(), Probe("one", "", (Question(text, tuple(order)),)))
        assert (result.accuracy, result.chance) == (accuracy, 0.25)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_is_the_same_for_the_same_seed_only(name):
    assert PROBES[name](3) == PROBES[name](3)
    assert PROBES[name](3) != PROBES[name](4)


def test_the_word_to_copy_followed_the_last_word_of_the_text():
    for question in copying(seed=1).questions:
        words, begun = (line.split() for line in question.text.split("\n"))
        assert words[words.index(begun[-1]) + 1] == question.answers[0].strip()
        assert len(set(question.answers)) == 5
        assert all(answer.strip() in words for answer in question.answers)


def test_sums_are_right_and_near_misses_are_not():
    probe = addition(seed=1)
    for line in probe.shared.splitlines():
        left, right = line.split("=")
        assert sum(map(int, left.split("+"))) == int(right)
    for question in probe.questions:
        values = [int(answer) for answer in question.answers]
        assert values[0] == sum(map(int, question.text.rstrip("=").split("+")))
        assert len(set(values)) == 5
        assert all(10 <= value <= 99 for value in values)


def test_every_needle_lies_in_the_text_once_and_at_its_own_depth():
    probe = needle(seed=1)
    places = [probe.shared.index(q.text + q.answers[0]) for q in probe.questions]
    assert places == sorted(places)
    assert places[0] < 0.1 * len(probe.shared) < 0.9 * len(probe.shared) < places[-1]
    assert all(probe.shared.count(q.text) == 1 for q in probe.questions)
    assert probe.chance == pytest.approx(1 / 5)
    assert all(len(set(q.answers)) == 5 for q in probe.questions)


def test_a_model_with_an_empty_cache_entry_is_scored_too():
    class Nothing(nn.Module):
        def forward(self, hidden_states, **_):
            return torch.zeros_like(hidden_states), None

    model = llama()
    model.config.layer_types = ["moe", "full_attention"]
    model.model.layers[0].self_attn = Nothing()
    result = score(model, Letters(), copying(count=2))
    assert result.questions == 2
    assert result.logprob < 0


def test_a_probe_longer_than_the_context_is_left_out(tiny, tokenizer):
    model = tiny.llama(num_hidden_layers=1, max_position_embeddings=512)
    assert [result.name for result in run_probes(model, tokenizer)] == ["copy", "addition"]
    assert needle().tokens(tokenizer) > 512 > copying().tokens(tokenizer)


def test_an_unknown_probe_is_refused():
    with pytest.raises(EvaluationError, match="expected one of copy, addition, needle"):
        run_probes(llama(), Letters(), names=["poetry"])


def error_rates(accuracies):
    return [(drops, 1 - accuracy / 100) for drops, accuracy in accuracies]


def test_the_published_fall_of_llama_3_8b_at_16_layers_is_a_cliff():
    # MMLU after dropping attention layers; 12 and 16 are published, the rest lies on the plateau before them
    curve = error_rates([(0, 65.3), (4, 65.1), (8, 64.7), (12, 63.9), (16, 38.2)])
    assert cliff(curve) == 16
    assert cliff(curve[:-1]) is None


def test_the_published_curve_of_llama_2_13b_leaves_its_trend_at_16_layers():
    curve = error_rates([(0, 55.1), (4, 54.7), (8, 54.5), (16, 48.2), (20, 51.5)])
    assert cliff(curve) == 16
    assert cliff(curve[:3]) is None


@pytest.mark.parametrize("slope", [0.01, 0.1, 1.0])
def test_a_steady_rise_is_a_trend_and_not_a_cliff(slope):
    assert cliff([(n, slope * n) for n in range(13)]) is None


def test_a_steep_rise_too_small_to_matter_is_no_cliff():
    assert cliff([(0, 0.0), (1, 0.001), (2, 0.002), (3, 0.03)]) is None


def test_unequal_steps_are_compared_per_layer():
    assert cliff([(0, 0.0), (1, 0.1), (2, 0.2), (12, 1.2)]) is None
    assert cliff([(0, 0.0), (1, 0.1), (2, 0.2), (3, 1.2)]) == 3


def test_order_does_not_matter_and_short_curves_have_no_cliff():
    assert cliff([(3, 1.2), (1, 0.1), (2, 0.2), (0, 0.0)]) == 3
    assert cliff([(0, 0.0), (1, 5.0)]) is None
    assert cliff([]) is None


@pytest.mark.real
def test_smollm2_copies_and_finds_needles_better_than_chance():
    folder = open_source("smollm2-135m").path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    probes = copying(count=12), needle(count=6, sentences=15), addition(count=4)
    copied, found, added = (score(model, tokenizer, probe) for probe in probes)
    assert copied.accuracy > 0.8
    assert found.accuracy > 0.5
    assert math.isfinite(added.logprob)


def test_a_rise_that_the_windows_do_not_agree_on_is_no_cliff():
    def curve(*last):
        return [(0, (2.0,) * 4), (1, (2.1,) * 4), (2, (2.2,) * 4), (3, last)]

    assert cliff(curve(3.2, 3.3, 3.1, 3.2)) == 3
    assert cliff(curve(2.2, 2.2, 6.2, 2.2)) is None  # the same mean, from one window
    assert cliff([(drops, losses[:1]) for drops, losses in curve(3.2, 3.3, 3.1, 3.2)]) is None  # one has no error


def test_windows_are_compared_with_themselves():
    hard = (0.0, 5.0, -1.0, 2.0)  # windows differ far more than drops do
    curve = [(n, tuple(h + rise for h in hard)) for n, rise in ((0, 0.0), (1, 0.1), (2, 0.2), (3, 1.2))]
    assert cliff(curve) == 3
