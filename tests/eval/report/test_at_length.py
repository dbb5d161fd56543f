"""`--long`: dense and windowed side by side at length, and what a reader is warned of."""

import pytest

from dropformer import api
from dropformer.eval.report.evaluation import Candidate, EvaluationOptions, evaluate
from dropformer.eval.report.page import html
from dropformer.eval.report.tables import long
from dropformer.eval.report.warnings import warnings
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import EvaluationError

TOKENS = 2048


@pytest.fixture(scope="module")
def found(tiny, tokenizer):
    dense = tiny.llama(num_hidden_layers=3, max_position_embeddings=TOKENS)
    plan = api.plan_unscored(ModelRef(name="tiny"), api.outline(dense), "window=0,2@16+4", (), None)
    models = [Candidate("dense", dense, tokenizer), Candidate("windowed", api.drop(dense, plan), tokenizer, plan)]
    return evaluate(models, EvaluationOptions(long=TOKENS))


def test_at_length_both_models_have_every_figure(found):
    dense, windowed = (model.long for model in found.models)
    starts = [band["start"] for band in dense["bands"]]
    assert starts == [band["start"] for band in windowed["bands"]] and {1, 1024} <= set(starts) <= {
        1,
        128,
        256,
        512,
        1024,
    }
    assert dense["bands"][0]["lost"] is None and windowed["bands"][0]["lost"] is not None
    assert len(windowed["needle"]["by_depth"]) == 5
    assert windowed["kv_bytes"] / dense["kv_bytes"] == pytest.approx((TOKENS + 2 * 20) / (3 * TOKENS))
    assert windowed["decoding"]["bound"] > dense["decoding"]["bound"] == 1.0
    assert windowed["decoding"]["kv_bytes"] < dense["decoding"]["kv_bytes"]


def test_what_is_lost_beyond_the_windows_is_told_from_what_is_lost_within(found):
    beyond = found.models[1].long["beyond"]
    assert (beyond["window"], beyond["past"]["start"]) == (20, 20)
    assert abs(beyond["within"]["lost"]) < 1e-3  # the first 16 of those 20 positions see everything
    head, body = long(found)
    assert all(len(row) == len(head) for row in body) and "At length" in html(found)


def test_a_loss_that_is_greater_beyond_the_windows_is_warned_of_and_an_equal_one_is_not(found):
    dense, windowed = found.models
    parts = {"within": {"lost": 0.01, "stderr": 0.001}, "past": {"lost": 0.09, "stderr": 0.01, "start": 20}}
    hurt = windowed.model_copy(update={"long": windowed.long | {"beyond": {"window": 20, **parts}}})
    even = windowed.model_copy(
        update={"long": windowed.long | {"beyond": {"window": 20, **parts, "within": parts["past"]}}}
    )
    assert any("beyond its windows of attention (20 tokens)" in line for line in warnings([dense, hurt]))
    assert not any("beyond" in line for line in warnings([dense, even]))


def test_more_tokens_than_the_context_are_refused_before_anything_is_measured(tiny, tokenizer):
    model = tiny.llama(num_hidden_layers=1, max_position_embeddings=64)
    with pytest.raises(EvaluationError, match="give fewer tokens to --long"):
        evaluate([Candidate("dense", model, tokenizer)], EvaluationOptions(long=128))
