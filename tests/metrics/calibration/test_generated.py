"""What the model writes itself: seeded, kept by its weights, and only what it wrote counts."""

import json

import pytest
import torch
from chat_tokenizer import Chat

from dropformer.metrics.calibration.data import text_windows
from dropformer.metrics.calibration.generated import Writer
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import windows
from dropformer.metrics.search.improve import Improver, improve
from dropformer.metrics.search.strategy import Target, quality
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import CalibrationError, ModelError


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DROPFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(model, name="self", fingerprint=None, **settings):
    said = []
    found = text_windows(
        Calibration(name, **{"samples": 3, "length": 24, **settings}), Writer(model, Chat(), fingerprint, said.append)
    )
    return found, said


def test_the_prompt_is_a_piece_of_a_text_and_only_what_follows_counts(tiny, cache):
    found, _ = written(tiny("llama"))
    prompts = windows(Calibration("builtin", samples=3, length=6), Chat()).ids.tolist()
    assert found.ids.shape == (3, 24) and all(row[:6] in prompts for row in found.ids.tolist())
    assert not found.scored[:, :6].any() and found.scored[:, 6:].all() and found.ref.name == "self"


def test_a_seed_writes_the_same_text_and_another_seed_another(tiny, cache):
    model, state = tiny("llama"), torch.get_rng_state()
    first, second, other = (written(model, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.ids, second.ids) and first.ref == second.ref
    assert not torch.equal(first.ids, other.ids) and torch.equal(state, torch.get_rng_state())


def test_a_text_is_written_once_for_the_same_weights(tiny, cache):
    model = tiny("llama")
    (first, said), (again, silent) = (written(model, fingerprint="f" * 64) for _ in range(2))
    assert (
        "writes 3 texts" in said[0]
        and said[-1] == "self: 18 of 18 tokens of 3 texts"
        and not silent
        and torch.equal(first.ids, again.ids)
    )
    next(cache.glob("written/*.json")).write_text("[[1.5]]")
    assert torch.equal(written(model, fingerprint="f" * 64)[0].ids, first.ids)


@pytest.mark.parametrize(
    "row",
    [
        lambda n: {"prompt": "ab" * (1 + n)},
        lambda n: {"messages": [{"role": "user", "content": "a" * n}]},
        lambda n: {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]},
    ],
)
def test_prompts_of_a_file_are_answered_whole(tiny, cache, tmp_path, row):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row(n)) + "\n" for n in range(4)))
    found, _ = written(tiny("llama"), f"self:{file}", samples=4, length=60)
    starts = (~found.scored & found.padding).sum(1).tolist()
    tokens = [len(row(n)["prompt"]) if "prompt" in row(n) else len("<user></><assistant>") + n for n in range(4)]
    assert sorted(starts) == sorted(tokens)
    for ids, counts in zip(found.ids, found.scored, strict=True):
        said = ids[counts].tolist()
        assert said and 2 not in said[:-1]  # up to the end-of-text token


def test_what_the_model_writes_chooses_repairs_and_gates(tiny, cache):
    model = tiny("llama")
    found, _ = written(model, samples=8, length=16)
    plan, repair, _ = improve(Improver(model, [found], quality("best")), ModelRef(name="tiny"), Target("attn:1"), found)
    assert plan.calibration["name"] == "self" and plan.calibration["hash"] == found.ref.hash
    assert len(plan.layers) == 1 and repair.passes > 0


def test_a_model_that_writes_nothing_and_a_text_for_several_models_are_refused(tiny, cache):
    with pytest.raises(ModelError, match="generates no text"):
        text_windows(Calibration("self", samples=2, length=16), Writer(None, Chat()))
    with pytest.raises(CalibrationError, match="several cannot share it"):
        windows(Calibration("self", samples=2, length=16), Chat())
    with pytest.raises(CalibrationError, match="does not exist"):
        written(tiny("llama"), "self:absent.jsonl")


@pytest.mark.parametrize("rows", ['{"completion": "a"}\n', '{"messages": 3}\n', '{"prompt": 1}\n'])
def test_rows_without_a_prompt_are_refused_with_their_line(tiny, cache, tmp_path, rows):
    file = tmp_path / "wrong.jsonl"
    file.write_text('{"prompt": "a"}\n' + rows)
    with pytest.raises(CalibrationError, match="line 2: expected"):
        written(tiny("llama"), f"self:{file}", samples=1)
