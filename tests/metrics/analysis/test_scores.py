"""Scores: averages, their standard error, and the file they are kept in."""

import pytest
import torch

from dropformer.metrics.analysis.analyze import analyze_model, joined, layer_scores
from dropformer.metrics.analysis.capture import WindowScores
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import CalibrationError, DropformerError

LAYER = [Layer("attn", 0)]


def rows(means, tokens):
    count = torch.tensor(tokens)[:, None]
    return WindowScores(torch.tensor(means, dtype=torch.float64)[:, None] * count, count)


def test_the_mean_is_over_tokens_not_over_windows():
    assert layer_scores(LAYER, rows([0.5, 0.9], [30, 10]))[0].similarity == pytest.approx(0.6)


def test_the_standard_error_of_equal_windows_is_that_of_their_means():
    means = [0.5, 0.6, 0.9, 0.7]
    assert layer_scores(LAYER, rows(means, [8] * 4))[0].stderr == pytest.approx(torch.tensor(means).std().item() / 2)


def test_the_standard_error_covers_the_truth_for_windows_of_unequal_length():
    generator = torch.Generator().manual_seed(0)
    misses = 0
    for _ in range(300):
        tokens = torch.randint(10, 200, (40,), generator=generator)
        score = layer_scores(LAYER, rows((0.8 + 0.1 * torch.randn(40, generator=generator)).tolist(), tokens.tolist()))[
            0
        ]
        misses += abs(score.similarity - 0.8) > 2 * score.stderr
    assert 4 <= misses <= 35  # about 1 in 20 of 300


def test_one_window_has_no_standard_error():
    assert layer_scores(LAYER, rows([0.5], [10]))[0].stderr is None


def test_a_layer_that_did_not_run_or_overflowed_is_named():
    with pytest.raises(CalibrationError, match=r"attn:0 .*--dtype float32"):
        layer_scores(LAYER, rows([torch.nan], [10]))


def test_windows_one_by_one_give_the_scores_of_one_batch(tiny, ids):
    model = tiny("llama")
    one = analyze_model(model, [ids])
    two = analyze_model(model, [ids[:1], ids[1:]])
    assert one.windows == two.windows == 2 and one.tokens == two.tokens == 24
    assert one.similarity() == pytest.approx(two.similarity(), abs=1e-6)
    assert one.stderr() == pytest.approx(two.stderr(), abs=1e-6)


def test_joined_rows_stand_one_after_another():
    both = joined([rows([0.5], [10]), rows([0.7, 0.8], [20, 30])])
    assert both.tokens.flatten().tolist() == [10, 20, 30] and both.total() == 60


def test_scores_are_the_same_after_writing_and_reading(tiny, ids, tmp_path):
    calibration = CalibrationRef(name="builtin", samples=2, length=12, seed=0, packed=True, skip_first=0, hash="0" * 64)
    scores = analyze_model(tiny("llama"), [ids]).model_copy(update={"calibration": calibration})
    assert Scores.read(scores.write(tmp_path / "scores.json")) == scores


def test_no_batches_is_an_error(tiny):
    with pytest.raises(CalibrationError, match="no calibration batches"):
        analyze_model(tiny("llama"), [])


def test_another_artifact_is_not_taken_for_scores(tiny, ids, tmp_path):
    text = analyze_model(tiny("llama"), [ids]).to_json().replace('"scores"', '"plan"')
    (tmp_path / "scores.json").write_text(text, encoding="utf-8")
    with pytest.raises(DropformerError, match="not a scores file"):
        Scores.read(tmp_path / "scores.json")
