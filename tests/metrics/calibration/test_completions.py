"""Of prompts with completions and of conversations only what the model is to write counts."""

import json

import pytest
import torch
from chat_tokenizer import Chat

from dropformer.eval.quality.perplexity import perplexity, side_by_side
from dropformer.metrics.analysis.analyze import analyze_model
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import computed_tokens, windows
from dropformer.metrics.search.improve import Improver
from dropformer.metrics.search.strategy import Strategy, Target
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import CalibrationError

PAIRS = [{"prompt": f"What is {n} and {n}? " * (1 + n % 3), "completion": f"It is {2 * n}."} for n in range(24)]
TALKS = [
    {"messages": [
        {"role": "user", "content": f"Add {n}."}, {"role": "assistant", "content": f"{n + 1}!"},
        {"role": "user", "content": "Again."}, {"role": "assistant", "content": f"{n + 2}!"},
    ]}
    for n in range(8)
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


def said(window, scored):
    """The tokens that count, as the tokenizer would write them."""
    return window[scored].tolist()


def test_a_completion_counts_with_its_end_and_a_prompt_does_not(pairs):
    made, tokenizer = windows(Calibration(pairs, samples=24, length=200), Chat()), Chat()
    wanted = sorted([*tokenizer(row["completion"])["input_ids"], 2] for row in PAIRS)
    assert sorted(said(ids, counts) for ids, counts in zip(made.ids, made.scored, strict=True)) == wanted
    assert not made.ref.packed and made.scored.sum() < made.padding.sum() / 2


def test_every_turn_of_the_assistant_counts_and_nothing_else(tmp_path):
    made = windows(Calibration(write(tmp_path / "talks.jsonl", TALKS), samples=8, length=200), Chat())
    tokenizer = Chat()
    turns = [[m["content"] + "</>" for m in row["messages"] if m["role"] == "assistant"] for row in TALKS]
    wanted = sorted(tokenizer("".join(both))["input_ids"] for both in turns)
    assert sorted(said(ids, counts) for ids, counts in zip(made.ids, made.scored, strict=True)) == wanted


def test_prompts_that_leave_no_room_for_a_completion_are_no_windows(tmp_path):
    rows = [{"prompt": "x" * 90, "completion": "no"}, {"prompt": "x", "completion": "yes"}]
    made = windows(Calibration(write(tmp_path / "t.jsonl", rows), samples=1, length=50), Chat())
    assert said(made.ids[0], made.scored[0]) == [*Chat()("yes")["input_ids"], 2]
    with pytest.raises(CalibrationError, match="gives 1 completions within 50 tokens, but 2 were asked for"):
        windows(Calibration(str(tmp_path / "t.jsonl"), samples=2, length=50), Chat())


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([PAIRS[0], {"prompt": "a"}], "line 2: expected a JSON object"),
        ([PAIRS[0], {"text": "prose"}], "line 2: expected a JSON object"),
        ([PAIRS[0], [1]], "line 2"),
        ([PAIRS[0], {"prompt": "a", "completion": "\ud83d"}], "line 2: half of a surrogate pair"),
        ([TALKS[0], {"messages": "hello"}], "line 2: expected `messages` to be a list"),
        ([TALKS[0], {"messages": [{"role": "user", "content": "a"}]}], "one or more of them the assistant's"),
        ([{"text": "prose"}, PAIRS[0]], "line 2: expected a JSON object with a text"),
    ],
)
def test_rows_of_another_form_are_one_line(rows, says, tmp_path):
    with pytest.raises(CalibrationError, match=says) as raised:
        windows(Calibration(write(tmp_path / "bad.jsonl", rows), samples=1, length=64), Chat())
    assert "\n" not in str(raised.value)


def test_messages_need_a_chat_template_that_keeps_earlier_turns(tmp_path):
    name = write(tmp_path / "talks.jsonl", TALKS)
    bare = Chat()
    bare.chat_template = None
    with pytest.raises(CalibrationError, match="has no chat template"):
        windows(Calibration(name, samples=1), bare)

    class Forgetful(Chat):
        def apply_chat_template(self, messages, **say):
            return super().apply_chat_template(messages[-1:], **say)

    with pytest.raises(CalibrationError, match="writes earlier turns differently"):
        windows(Calibration(name, samples=1), Forgetful())


def test_rankings_average_over_completions_alone(pairs, tiny):
    model = tiny("llama", eos_token_id=2)
    made = windows(Calibration(pairs, samples=6, length=200), Chat())
    scores = analyze_model(model, made.batches(3))
    assert scores.tokens == int(made.scored.sum())
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    total = 0.0
    for ids, counts in zip(made.ids, made.scored, strict=True):
        with torch.no_grad():
            model(ids[None])
        x, y = seen.pop()
        total += float(torch.cosine_similarity(x[0], y[0], dim=-1)[counts].sum())
    hook.remove()
    assert scores.similarity()[Layer("block", 1)] == pytest.approx(total / scores.tokens, abs=1e-5)


def test_perplexity_of_completions_is_that_of_their_tokens(pairs, tiny):
    model = tiny("llama")
    made = windows(Calibration(pairs, samples=4, length=200), Chat())
    total = 0.0
    for ids, counts in zip(made.ids, made.scored, strict=True):
        with torch.no_grad():
            log = model(ids[None]).logits[0].log_softmax(-1)
        total -= float(log[:-1].gather(1, ids[1:, None])[:, 0][counts[1:]].sum())
    found = perplexity(model, made.ids, made.scored)
    assert found.tokens == int(made.scored.sum()) and found.nll == pytest.approx(total / found.tokens, abs=1e-5)
    both = side_by_side(model, model, made.ids, made.scored)
    assert both.dense == both.pruned and both.dense.nll == pytest.approx(found.nll, abs=1e-5)
    assert both.divergence.value == pytest.approx(0, abs=1e-6) and both.divergence.tokens == found.tokens


def test_searches_repairs_and_the_gate_do_not_hear_what_prompts_end_in(tmp_path, tiny):
    """Prompts that follow the completions in a window cannot be seen from there; with them all figures are the same."""

    def improved(tail):
        rows = [{"messages": [*talk["messages"], {"role": "user", "content": tail}]} for talk in TALKS]
        data = windows(Calibration(write(tmp_path / "t.jsonl", rows), samples=8, length=200), Chat())
        improver = Improver(tiny("llama", eos_token_id=None), [data], Strategy(select="greedy", repair=("refit",)))
        layers, *_ = improver.choose_forms(Target("attn:1"))
        return layers, improver.repair(layers, data)[0]

    (one, mended), (other, again) = improved("abcdefg"), improved("tuvwxyz")
    assert one == other and mended.tensors.keys() == again.tensors.keys()
    assert all(torch.allclose(mended.tensors[name], again.tensors[name], atol=1e-4) for name in mended.tensors)
    assert [g.dense for g in mended.gates] == pytest.approx([g.dense for g in again.gates], abs=1e-4)


def test_documents_run_by_length_compute_little_more_than_they_need(tmp_path):
    rows = [{"text": "x" * n} for n in (5, 90, 7, 80, 11, 85, 6, 88)]
    made = windows(Calibration(write(tmp_path / "d.jsonl", rows), samples=8, length=100, packed=False), Chat())
    run = [inputs["input_ids"].numel() for inputs, _ in made.batches(4)]
    assert sum(run) == computed_tokens(made.lengths(), 4) == 4 * 11 + 4 * 90
    assert sum(made.lengths()) == 372 and max(run) < 8 * 90
