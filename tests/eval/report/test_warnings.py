"""What a reader of an evaluation must not miss is said in a line."""

import pytest

from dropformer.eval.report.evaluation import ModelResult
from dropformer.eval.report.warnings import warnings
from dropformer.eval.tasks.tasks import Metric, TaskResult, TaskResults


def probe(name: str, accuracy: float, chance: float = 0.2, stderr: float = 0.05) -> dict:
    return {"name": name, "accuracy": accuracy, "stderr": stderr, "logprob": -1.0, "questions": 32, "chance": chance}


def result(name: str, *probes: dict, accuracy: float | None = None) -> ModelResult:
    tasks = None
    if accuracy is not None:
        one = TaskResult(
            name="mmlu", alias="mmlu", questions=100, metric="acc", metrics={"acc": Metric(value=accuracy, stderr=0.03)}
        )
        tasks = TaskResults(named=("mmlu",), tasks={"mmlu": one}, correct={}, backend="fast", lm_eval="0", seed=0)
    return ModelResult(
        name=name, parameters=1, parameter_bytes=4, kv_bytes_per_token=1, probes=list(probes), tasks=tasks
    )


def test_one_model_alone_needs_no_caution():
    assert warnings([result("dense", probe("copy", 0.2))]) == []


@pytest.mark.parametrize(("after", "said"), [(0.5, True), (0.85, False)])
def test_a_probe_that_falls_clearly_is_named_with_both_figures(after, said):
    lines = warnings([result("dense", probe("needle", 0.9)), result("pruned", probe("needle", after))])
    assert any("needle probe falls from 90% to" in line for line in lines) == said


def test_a_probe_that_the_dense_model_guesses_is_said_to_show_nothing():
    dense, pruned = (
        result(n, probe("addition", a), probe("needle", 1.0)) for n, a in (("dense", 0.25), ("pruned", 0.2))
    )
    lines = warnings([dense, pruned])
    assert lines == ["dense is at chance on the probes addition, so they cannot show a loss"]


def test_a_needle_that_did_not_fit_is_said_to_be_left_out():
    lines = warnings([result("dense", probe("copy", 1.0)), result("pruned", probe("copy", 1.0))])
    assert lines == ["the needle probe was left out: its text is longer than the context of dense"]


def test_mmlu_is_said_to_hold_longer_than_what_it_does_not_test():
    lines = warnings([result("dense", accuracy=0.6), result("pruned", accuracy=0.59)])
    assert len(lines) == 1 and "MMLU degrades later than generation, arithmetic and long context" in lines[0]


def test_a_model_near_chance_on_mmlu_is_said_to_show_no_loss():
    lines = warnings([result("dense", accuracy=0.27), result("pruned", accuracy=0.26)])
    assert "near chance on mmlu (27.0%, guessing gives 25%)" in lines[0]
