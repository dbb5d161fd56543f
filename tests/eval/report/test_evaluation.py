"""`evaluate`: everything side by side on the same questions and text, and what a reader should be warned of."""

import json
import subprocess
import sys

import pytest

from dropformer import api
from dropformer.eval.cost.sinks import fitting
from dropformer.eval.cost.speed import Setting
from dropformer.eval.quality.cliff import Trend, quarters, trend
from dropformer.eval.quality.perplexity import side_by_side
from dropformer.eval.report.evaluation import Candidate, EvaluationOptions, evaluate
from dropformer.eval.report.page import html
from dropformer.eval.report.pictures import kept_by_test, quality_by_drop, speed_against_bound
from dropformer.eval.report.tables import summary
from dropformer.eval.report.warnings import warnings
from dropformer.eval.tasks.results import TaskOptions, TaskResults
from dropformer.eval.tasks.tasks import evaluate_tasks
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import windows
from dropformer.prune.artifact import ModelRef
from dropformer.prune.plan import make_plan


@pytest.fixture(scope="module")
def deep(tiny):
    return tiny.llama(num_hidden_layers=6, max_position_embeddings=64)


@pytest.fixture(scope="module")
def plan(deep):
    outline = api.outline(deep)
    layers = outline.layers("attn")[:5]
    return make_plan(outline, ModelRef(name="deep"), "attn:5", layers)


@pytest.fixture(scope="module")
def found(deep, plan, tokenizer, mmlu_data):
    options = EvaluationOptions(
        ("mmlu_anatomy",), TaskOptions(shots=0, mmlu_data=mmlu_data), Calibration("heldout", 3, 32),
        speed=(Setting(1, 8, 4),), repeats=2, stream=200,
    )  # fmt: skip
    pruned = Candidate("pruned", api.drop(deep, plan), tokenizer, plan)
    return evaluate([Candidate("deep", deep, tokenizer), pruned], options)


def test_the_table_has_a_row_for_every_measurement_and_a_column_for_every_model(found):
    head, body = summary(found)
    labels = " ".join(row[0] for row in body)
    assert head == ["", "deep", "pruned"]
    assert all(len(row) == 3 for row in body)
    assert [row[0] for row in body if not row[2]] == ["batch 4, 1 + 8"]  # a heading for the speeds below it
    for word in ("parameters", "perplexity", "KL to dense", "mmlu_anatomy", "prefill", "decode", "streamed"):
        assert word in labels


def test_streaming_tells_how_much_faster_a_token_is_than_recomputing_its_window(found):
    for model in found.models:
        took = model.stream["seconds_per_token"]
        assert model.stream["speedup_over_recompute"] == pytest.approx(took["recompute"] / took["streaming"])
        assert len(model.stream["segments"]) == 16 and model.stream["cache_bytes"] > 0
    assert found.models[1].stream["cache_bytes"] * 6 == found.models[0].stream["cache_bytes"]


def test_the_window_of_a_stream_fits_the_context(tiny):
    assert fitting(tiny.llama(max_position_embeddings=64)).size == 64
    assert fitting(tiny.llama(max_position_embeddings=4096)).size == 1024


def test_the_trend_of_a_plan_starts_at_dense_and_ends_at_the_pruned_model(found):
    curve = found.models[1].trend
    assert [drops for drops, _ in curve.points] == quarters(5) and curve.drops == 5
    assert found.models[0].trend is None


def test_a_plan_of_few_drops_or_with_repairs_has_no_trend(deep, plan, tokenizer):
    data = windows(Calibration("heldout", 2, 16), tokenizer)
    both = side_by_side(deep, deep, data.ids)
    assert trend(deep, plan.model_copy(update={"drops": plan.drops[:3]}), data, both) is None
    assert trend(deep, plan.model_copy(update={"repairs": ["refit: kept"]}), data, both) is None


def test_a_cliff_is_said_with_where_it_lies(found):
    steep = Trend(points=[(0, 2.0), (2, 2.05), (4, 2.1), (6, 2.15), (8, 4.0)], drops=8, cliff=8)
    hurt = [found.models[0], found.models[1].model_copy(update={"trend": steep})]
    assert any("between 6 and 8 of the 8 drops" in line for line in warnings(hurt))


def test_the_page_stands_alone(found):
    page = html(found)
    assert "://" not in page.split("<body", 1)[1] and "streamed" in page


def test_the_page_has_the_pictures_and_tables_of_what_was_measured(found):
    shown = html(found)
    for title in ("Side by side", "Quality against drop", "Speed and memory", "Beyond the context"):
        assert f"<h2>{title}</h2>" in shown
    assert shown.count("<img") == 3 and "5 attention" in shown  # the curve, what is kept, speed against its bound


def test_what_is_not_known_is_not_drawn(found, tmp_path):
    alone = found.model_copy(update={"models": found.models[:1]})
    for draw in (quality_by_drop, kept_by_test, speed_against_bound):
        assert draw(alone, tmp_path / "none.png") is None
    assert "<img" not in html(alone)


def test_a_compiler_that_fails_is_said_and_leaves_the_other_speeds(deep, tokenizer, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch.compile", broken)
    options = EvaluationOptions(speed=(Setting(8, 2),), repeats=1, compile=True)
    report = evaluate([Candidate("deep", deep, tokenizer)], options)
    assert report.warnings == ["torch.compile failed (RuntimeError: no C++ compiler)"]
    assert [row["compiled"] for row in report.models[0].speed] == [False]


@pytest.mark.slow
def test_two_launched_processes_report_what_one_reports(llama, tokenizer, mmlu_data, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]
    command = [*launch, "-m", "dropformer", "evaluate", tmp_path / "model", "--tasks", "mmlu", "--shots", "2"]
    command += ["--mmlu-data", mmlu_data, "--limit", "21", "--samples", "2", "--length", "32", "--no-probes", "--json"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    both = TaskResults.model_validate(json.loads(done.stdout)["models"][0]["tasks"])
    one = evaluate_tasks(llama, tokenizer, ["mmlu"], TaskOptions(shots=2, mmlu_data=mmlu_data, limit=21))
    assert both.correct == one.correct and both.tasks == one.tasks
    assert 0 < both.stats["requests"] < one.stats["requests"]
