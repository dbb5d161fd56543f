"""`prune evaluate M --draft PLAN` and `prune estimate M --draft`, as a person types them."""

import json
from dataclasses import replace

import pytest
import torch
from command import run

from dropformer import api
from dropformer.eval.draft.cost import MeasuredSteps
from dropformer.eval.draft.evaluate import DraftEvaluation, lengths
from dropformer.eval.draft.measure import DraftRun
from dropformer.eval.report.arguments import EvaluationFacts, validate_evaluation
from dropformer.metrics.draft.acceptance import Acceptance
from dropformer.metrics.draft.formula import speedup
from dropformer.prune.errors import OutputError
from dropformer.prune.plan import DraftRef


@pytest.fixture
def planned(lettered, here):
    """A plan.json for a draft of the tiny model with letters, of a spec."""

    def make(spec):
        opened = api.open_model(str(lettered))
        plan = api.plan_unscored(opened.ref, api.outline(opened.model), spec, (), None)
        ref = DraftRef(tokens=2, acceptance=0.9, cost=0.5, speedup=1.1, temperature=0.0, context=64, batch=1)
        plan.model_copy(update={"draft": ref}).write(here / "plan.json")
        return lettered, here / "plan.json"

    return make


def test_evaluate_measures_equality_acceptance_speed_and_memory_of_a_draft(planned, capsys):
    model, plan = planned("window=0,1,2,3@8+2")
    words = ["evaluate", model, "--draft", plan, "--text", "builtin", "--samples", "2", "--length", "96"]
    status, printed, said = run(*words, "--new-tokens", "6", "--json", capsys=capsys)
    assert status == 0, said
    found = json.loads(printed)
    assert status == 0 and (found["equal"], found["prompts"], found["drafted"]) == (2, 2, 2)
    assert 0 <= found["acceptance_measured"] <= 1 and set(found["by_domain"]) == {"builtin"}
    assert found["speedup_predicted"] == pytest.approx(
        found["round_tokens_predicted"] / (2 * found["cost"] + found["verify_cost"])
    )
    assert found["pair_bytes"] == found["dense_bytes"] and found["view_bytes"] > 0


def test_what_evaluate_prints_names_the_figures(planned, capsys, tmp_path):
    model, plan = planned("attn=2")
    words = ["evaluate", model, "--draft", plan, "--text", "builtin", "--samples", "1", "--length", "64"]
    status, printed, _ = run(*words, "--new-tokens", "4", "--out", tmp_path / "said", capsys=capsys)
    assert {path.name for path in (tmp_path / "said").iterdir()} == {"draft.json", "draft.png"}
    assert status == 0 and "text: 1 of 1 equal" in printed
    for words in ("acceptance", "by position", "a draft step costs", "tokens/s", "speed-up", "memory"):
        assert words in printed


@pytest.mark.parametrize("temperature, said", [(0.0, "text: 1 of 1 equal"), (0.7, "sampled at temperature 0.7,")])
def test_sampled_texts_are_not_called_equal(temperature, said):
    ones = torch.ones(1, 2, 4, dtype=torch.float64)
    found = Acceptance(ones, ones, torch.tensor([8, 20]), ("builtin",), temperature)
    run = DraftRun([] if temperature else [True], [4], [1.0], [0.5], [(2, 2)], 1, 1, 1, 1)
    result = DraftEvaluation(2, found, MeasuredSteps(1.0, 0.5, 1.2), run)
    assert said in result.lines()[0]
    assert (result.numbers()["equal"], result.numbers()["prompts"]) == (None if temperature else 1, 1)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--length", "12"], "too short"),
        (["--samples", "0"], "samples"),
        (["other"], "one model"),
        (["--speed"], "--speed"),
    ],
)
def test_what_cannot_be_measured_is_one_line(planned, capsys, more, said):
    model, plan = planned("attn=2")
    status, _, err = run("evaluate", model, *more, "--draft", plan, "--text", "builtin", capsys=capsys)
    assert status == 2 and said in err and err.count("\n") <= 4, err


def test_figures_are_written_again_into_the_folder_of_an_earlier_run(lettered, here):
    (here / "said").mkdir()
    (here / "said" / "draft.json").write_text("{}")
    facts = EvaluationFacts([str(lettered)], (), "builtin", "fast", None, None, None, here / "said")
    validate_evaluation(replace(facts, given=frozenset({"draft", "out"})))
    with pytest.raises(OutputError, match=r"holds no report\.html"):
        validate_evaluation(replace(facts, given=frozenset({"out"})))


def test_a_plan_of_other_weights_is_refused(planned, capsys):
    model, plan = planned("attn=2")
    fields = json.loads(plan.read_text())
    fields["model"]["fingerprint"] = "0" * 64
    plan.write_text(json.dumps(fields))
    status, _, err = run("evaluate", model, "--draft", plan, capsys=capsys)
    assert status == 2 and "made for other weights" in err


def test_estimate_tells_from_which_acceptance_on_a_draft_pays(capsys):
    words = ["estimate", "llama-3-8b", "--drop", "window:31@512+4", "--context", "32768", "--hardware", "h100-sxm"]
    status, printed, _ = run(*words, "--batch", "8", "--draft", "--json", capsys=capsys)
    found = json.loads(printed)
    assert status == 0 and 0.2 < found["cost"] < 0.5
    gains = [gives for _, gives in found["curve"].values()]
    assert gains == sorted(gains) and found["needed"] < 0.6
    drafted, gives = found["curve"]["0.9"]
    assert gives == pytest.approx(speedup(0.9, drafted, found["cost"]), rel=0.02)
    status, printed, _ = run(*words, "--batch", "8", "--draft", capsys=capsys)
    assert "pays from an acceptance of" in printed


def test_estimate_takes_a_recipes_published_lists_for_a_draft_too(capsys):
    words = ["estimate", "mistral-7b", "--hardware", "h100-sxm", "--draft", "--json", "--drop"]
    costs = []
    for spec in ("published:attn:8", "attn:8"):
        status, printed, said = run(*words, spec, capsys=capsys)
        assert status == 0, said
        costs.append(json.loads(printed)["cost"])
    assert costs[0] == pytest.approx(costs[1])


def test_estimate_says_where_no_acceptance_would_pay(capsys):
    words = ["estimate", "llama-3-8b", "--drop", "attn:1", "--context", "64", "--hardware", "h100-sxm", "--draft"]
    status, printed, _ = run(*words, capsys=capsys)
    assert status == 0 and "pays at no acceptance" in printed


def test_prompts_are_beginnings_of_a_window_up_to_the_longest():
    assert lengths(100, 3, 10) == [40, 70, 100]
    assert lengths(100, 1, 10) == [100]


def test_new_tokens_of_an_estimate_would_be_ignored(capsys):
    words = ["estimate", "llama-3-8b", "--drop", "attn:1", "--draft", "--new-tokens", "5"]
    status, _, err = run(*words, capsys=capsys)
    assert status == 2 and "--new-tokens has no effect beside --draft" in err
