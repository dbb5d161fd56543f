"""`prune --draft`: the draft that is found, what it says, and what it writes."""

import json
from pathlib import Path

import pytest

from dropformer.cli import app
from dropformer.eval.draft.choose import choose_draft
from dropformer.eval.draft.options import DraftOptions, parse_rungs
from dropformer.eval.draft.run import evaluate_pair
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import windows
from dropformer.progress import Silent
from dropformer.prune.errors import DropformerError, EvaluationError, PlanError
from dropformer.prune.plan import Plan
from dropformer.prune.window import Window
from dropformer.recipes.opening import open_model
from dropformer.recipes.placement import Placement

RUN = ["--draft", "--context", "96", "--rungs", "mlp,window:16+2", "--calibration", "builtin", "-q"]


def prune(folder, *more):
    return app(["--model", str(folder), *RUN, *more], standalone_mode=False)


def test_a_draft_that_does_not_pay_is_a_no_with_figures_and_nothing_is_written(lettered, here, capsys):
    """Two layers of a tiny model cost nothing to begin with: on a CPU its steps are launches."""
    prune(lettered, "--max-drop", "0", "--out", "draft")
    said = capsys.readouterr().out
    assert "acceptance" in said and "of a dense step" in said
    if "does not pay" in said:
        assert "must cost less than" in said and "nothing was written" in said and not Path("draft").exists()


def test_a_draft_is_written_anyway_with_a_plan_that_says_what_it_gives(lettered, here, capsys):
    prune(lettered, "--write-anyway", "--out", "draft", "--seconds", "0", "--json")
    found = json.loads(capsys.readouterr().out)
    plan = Plan.read(here / "draft" / "plan.json")
    assert found["written"] == "draft" and plan.draft.tokens == found["tokens"]
    assert 0 < plan.draft.acceptance <= 1 and plan.draft.context == 96
    card = (here / "draft" / "README.md").read_text()
    assert "A draft of the model it came from" in card and "(draft.png)" in card
    assert (here / "draft" / "draft.png").stat().st_size > 1000
    assert len(found["expected"]) == 12
    assert max(found["expected"].values()) == pytest.approx(found["speedup"])


def test_a_repaired_draft_is_measured_again_and_kept_where_it_is_faster(lettered, here, capsys):
    """Distilled, a tiny model's neighbours follow the dense stream a little better, or the draft stays as it was."""
    more = ("--max-drop", "1", "--repair", "refit,distill", "--samples", "2", "--seconds", "0", "--temperature", "0")
    prune(lettered, *more, "--write-anyway", "--out", "draft", "--json")
    found = json.loads(capsys.readouterr().out)
    before, after = found["repaired"]
    plan = Plan.read(here / "draft" / "plan.json")
    assert plan.layers and plan.draft.acceptance == pytest.approx(max(before, after))
    assert bool(plan.repairs) == (after > before)
    words = ["evaluate", str(lettered), "--draft", "draft/plan.json", "--text", "builtin", "--samples", "1"]
    app([*words, "--length", "96", "--new-tokens", "4", "--json"], standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    assert result["equal"] == 1 and (result["pair_bytes"] > result["dense_bytes"]) == bool(plan.repairs)
    if plan.repairs:
        (here / "plan.json").write_text((here / "draft" / "plan.json").read_text())
        with pytest.raises(PlanError, match="whose weights lie in its checkpoint"):
            evaluate_pair(str(lettered), here / "plan.json", Calibration("builtin", 1, 96), 4, Placement())


class Told(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def chosen(folder, text, rungs, repaired=None):
    """What is said in a search for a draft behind 64 tokens."""
    opened, told = open_model(str(folder)), Told()
    options = DraftOptions(context=64, rungs=rungs, hardware="a6000")
    data = [windows(Calibration(str(text), 2, 64), opened.tokenizer)]
    return choose_draft(opened, options, data, (), told, repaired), told.lines


def test_a_draft_of_windows_alone_has_nothing_to_repair_and_says_so(lettered):
    found, said = chosen(lettered, "builtin", "window:16+2", lambda plan: pytest.fail("repaired"))
    assert found.plan.windows and said == ["the draft drops no layer, so there is nothing to repair"]


def test_short_answers_are_read_without_their_padding_and_their_length_is_said(lettered, here):
    rows = [{"prompt": "a" * (8 + n), "completion": "b c d" * 4} for n in range(12)]
    (here / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, said = chosen(lettered, here / "chat.jsonl", "mlp,window:40+2")
    assert found.plan.layers and 0 < found.best.acceptance <= 1
    assert [line.partition(" ")[0] for line in said] == ["window:40+2", "acceptance"]
    assert "holds all of a text of" in said[0] and "all that the texts have" in said[1]


def test_repairs_that_a_draft_cannot_have_are_refused(lettered, here):
    for more, said in (
        (("--quality", "linear"), "repair it by refit or distill"),
        (("--quality", "paper"), "--quality has no effect"),
    ):
        with pytest.raises(DropformerError, match=said):
            prune(lettered, *more)


@pytest.mark.parametrize("temperature", ["inf", "1e-40"])
def test_temperatures_that_are_none_are_refused(lettered, here, temperature):
    with pytest.raises(EvaluationError, match=f"--temperature {temperature} is none; expected 0"):
        prune(lettered, "--temperature", temperature)


def test_a_measurement_without_end_is_refused(lettered, here):
    with pytest.raises(EvaluationError, match="--seconds inf never ends"):
        prune(lettered, "--seconds", "inf")


@pytest.mark.parametrize("text", ["depth", "window", "", "window:0"])
def test_unknown_rungs_are_named(text):
    with pytest.raises(PlanError, match="expected"):
        parse_rungs(text)


def test_rungs_come_in_the_order_of_the_search():
    assert parse_rungs("window:8+2,drop") == ["block", "attn", "mlp", Window(8, 2)]
