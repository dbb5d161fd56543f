"""What the model's anatomy alone shows to be wrong is said before any calibration text is read."""

import pytest
from command import run
from gguf_families import family_gguf, tiny_model

from dropformer.api import plan_unscored
from dropformer.prune.artifact import ModelRef
from dropformer.prune.choosing import check_possible
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import BranchOutline, Outline, StackOutline


@pytest.fixture
def uncalibrated(monkeypatch):
    import dropformer.scoring as scoring
    import dropformer.selection as selection

    def read(*_, **__):
        raise AssertionError("a calibration text was read")

    monkeypatch.setattr(scoring, "calibration_data", read)
    monkeypatch.setattr(selection, "text_windows", read)


@pytest.mark.parametrize(
    "options, says",
    [
        (("--drop", "attn:4", "--keep", "0"), "`attn:4` drops 4 attention layers"),
        (("--drop", "attn=0,attn:4"), "1 of them protected or dropped already"),
        (("--drop", "mlp:3,mlp:2"), "`mlp:2` drops 2 MLP layers"),
        (("--drop", "attn:3,attn=7"), "names attention layer 7"),
        (("--drop", "attn:4"), "drops every attention layer"),
        (("--drop", "attn:10%"), "rounds down to no layer"),
        (("--drop", "mlp:2,window=9@16"), "names attention layer 9"),
        (("--drop", "attn:4,mlp:1", "--keep", "1", "--quality", "best"), "`attn:4` drops 4"),
        (("--budget", "kv:-90%", "--keep", "0,1"), "cannot be reached with the layers that may be dropped (4 of them)"),
    ],
)
def test_it_is_refused_before_calibration(lettered, uncalibrated, capsys, here, options, says):
    status, out, err = run("--model", lettered, *options, "--no-measure", "--out", here / "out", "-q", capsys=capsys)
    assert status == 2 and says in err and out == "", err


def test_a_sweep_and_an_analysis_that_stops_early_are_refused_as_soon(lettered, uncalibrated, capsys, here):
    status, _, err = run("sweep", lettered, "--drop", "attn:0..4", "--out", here / "s", "-q", capsys=capsys)
    assert status == 2 and "every attention layer" in err
    say = ("analyze", lettered, "--until-stable", "attn=1,attn:9", "--out", here / "a", "-q")
    assert run(*say, capsys=capsys)[0] == 2


@pytest.mark.parametrize(
    "options, says",
    [
        (("--drop", "attn:2"), "leaves blocks without one; add --dense"),
        (("--drop", "attn=1,mlp=2"), "leaves blocks without one; add --dense"),
        (("--drop", "block=0,attn=-1"), "leaves blocks without one; add --dense"),
        (("--plan", "attention.json"), "leaves blocks without one; add --dense"),
        (("--drop", "block:1", "--quality", "best"), "repairs are written for llama and qwen2 alone"),
        (("--drop", "attn:1", "--quality", "best", "--dense"), "writes no repaired weights"),
        (("--drop", "window:1@16"), "--format gguf holds no attention windows"),
        (("--plan", "window.json", "--dense"), "--format gguf-dense holds no attention windows"),
    ],
)
def test_what_a_gguf_file_cannot_hold_is_refused_before_its_model_is_opened(
    monkeypatch, capsys, here, qwen3_file, options, says
):
    def opened(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("dropformer.job.open_model", opened)
    options = [here / option if option.endswith(".json") else option for option in options]
    command = ("--model", qwen3_file, *options, "--format", "gguf", "--no-measure", "--out", here / "out", "-q")
    status, out, err = run(*command, capsys=capsys)
    assert status == 2 and says in err and out == "" and err.count("\n") == 1, err


def test_a_plan_that_a_format_cannot_hold_is_refused_before_what_the_format_needs(capsys, here, qwen3_file):
    command = ("--model", qwen3_file, "--plan", here / "window.json", "--format", "onnx", "--out", here / "out")
    status, _, err = run(*command, capsys=capsys)
    assert status == 2 and "--format onnx holds no attention windows" in err


def test_pairs_that_a_gguf_file_can_lose_are_not_refused(capsys, here, qwen3_file):
    command = ("--model", qwen3_file, "--drop", "mlp=1,attn=2", "--format", "gguf", "--no-measure", "--out", here / "o")
    assert run(*command, "-q", capsys=capsys)[0] == 0


@pytest.fixture
def qwen3_file(here):
    """A tiny GGUF file of Qwen 3, and plans of it."""
    model = tiny_model("qwen3", 4)
    outline = summarize(model, discover(model))
    for name, spec in (("attention", "attn=1"), ("window", "window=1@16")):
        plan_unscored(ModelRef(name="dense.gguf"), outline, spec, (), None).write(here / f"{name}.json")
    return family_gguf(here / "dense.gguf", model)


def outline(attending):
    """Six blocks, of which some attend."""
    made = [("attn", attending), ("mlp", list(range(6)))]
    branches = [BranchOutline(kind=kind, blocks=on, modules={kind: "zeros"}, parameters=1) for kind, on in made]
    return Outline(stacks=[StackOutline(path="layers", blocks=6, branches=branches)], parameters=99)


def test_a_hybrid_has_fewer_attention_layers_than_blocks():
    with pytest.raises(PlanError, match="the model has 2"):
        check_possible(outline([1, 4]), "attn:3")
    check_possible(outline([1, 4]), "attn:1,mlp:3")


@pytest.mark.parametrize("spec", ["joint:7", "joint:4,attn:2", "block:2,attn:2", "mlp:6", "attn:3,window:4@8"])
def test_what_only_scores_decide_is_not_refused(spec):
    check_possible(outline([0, 1, 3, 4]), spec)
