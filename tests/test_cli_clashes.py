"""Options that would be ignored, and arguments that are known to be wrong, are one line before anything is loaded."""


import pytest
from command import run

from dropformer import clashes


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DROPFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def unopened(llama_folder, here, monkeypatch):
    """A tiny Llama that no command may open: what is wrong is said before."""

    def opened(*args, **kwargs):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("dropformer.api.open_model", opened)
    monkeypatch.setattr("dropformer.recipes.open_source", opened)
    return llama_folder


def bad(*args, capsys, here, said) -> None:
    before = sorted(p for p in here.rglob("*") if "cache" not in p.parts)
    status, out, err = run(*args, capsys=capsys)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert said in err, err
    assert sorted(p for p in here.rglob("*") if "cache" not in p.parts) == before


PLAN = ("--plan", "plan.json")
DROP = ("--drop", "attn:1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((*PLAN, "--keep", "0"), "--keep has no effect with --plan, which says what goes; leave it out"),
        ((*PLAN, "--scores", "scores.json"), "--scores has no effect with --plan"),
        ((*PLAN, "--metric", "cca", "--repair", "refit"), "--metric has no effect with --plan"),
        ((*PLAN, "--select", "greedy"), "--select has no effect with --plan"),
        ((*PLAN, "--keep", "0", "--select", "greedy"), "--keep and --select have no effect with --plan"),
        ((*PLAN, "--device", "cpu"), "--device has no effect with --plan, which is followed without a model"),
        ((*PLAN, "--dtype", "float32"), "leave it out or add --measure"),
        ((*PLAN, "--device-map", "auto"), "add --measure"),
        ((*PLAN, "--calibration", "builtin"), "add --measure"),
        ((*PLAN, "--length", "16"), "add --measure"),
        ((*PLAN, "--text", "builtin"), "add --measure"),
        ((*PLAN, "--seconds", "0"), "add --measure"),
        ((*PLAN, "--no-measure", "--seconds", "0"), "add --measure"),
        ((*PLAN, "--samples", "3"), "--samples has no effect with --plan, for which nothing is scored"),
        ((*PLAN, "--measure", "--seed", "3"), "--seed has no effect with --plan, for which nothing is scored"),
        ((*PLAN, "--skip-first", "1"), "--skip-first has no effect"),
        ((*PLAN, "--batch-size", "2"), "--batch-size has no effect"),
        ((*PLAN, "--gate", "builtin"), "--gate has no effect where nothing is repaired; leave it out or add --repair"),
        ((*DROP, "--scores", "scores.json", "--calibration", "builtin"), "--calibration has no effect with --scores"),
        ((*DROP, "--scores", "scores.json", "--samples", "3", "--length", "9"), "--samples and --length have no"),
        ((*DROP, "--scores", "scores.json", "--quality", "best"), "--scores has no effect beside --quality"),
        ((*DROP, "--batch-size", "2", "--metric", "cca"), "--batch-size has no effect with --quality"),
        ((*DROP, "--batch-size", "1", "--refine", "1"), "--batch-size has no effect with --quality"),
        ((*DROP, "--gate", "builtin"), "--gate has no effect where nothing is repaired"),
        ((*DROP, "--gate", "builtin", "--metric", "cca"), "--gate has no effect where nothing is repaired"),
        ((*DROP, "--format", "gguf", "--link"), "--link has no effect with --format gguf"),
        ((*DROP, "--format", "onnx", "--link"), "--link has no effect with --format gguf or onnx"),
        ((*DROP, "--metric", "cca", "--select", "iterative"), "--metric has no effect where a search chooses"),
        ((*DROP, "--metric", "cca", "--quality", "best"), "leave it out or add --select one-shot"),
        (("--budget", "kv:-25%", "--metric", "cca"), "--metric has no effect with --budget"),
        (("--budget", "kv:-25%", "--select", "greedy"), "--select has no effect with --budget"),
        ((*DROP, "--no-measure", "--text", "builtin"), "--text has no effect with --no-measure"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(unopened, here, capsys, options, said):
    bad("--model", unopened, *options, "-q", capsys=capsys, here=here, said=said)


@pytest.mark.parametrize("others", [("--plan", "p.json"), ("--budget", "kv:-25%"), ("--plan", "p.json", "--budget", "x")])
def test_what_goes_is_said_once(unopened, here, capsys, others):
    said = "give only one of --drop, --plan and --budget"
    bad("--model", unopened, *DROP, *others, capsys=capsys, here=here, said=said)


def test_options_before_a_subcommand_are_refused(unopened, here, capsys):
    options = ("--model", unopened, *DROP)
    said = "--drop and --model have no effect before analyze; put options behind analyze"
    bad(*options, "analyze", unopened, capsys=capsys, here=here, said=said)
    bad("--json", "recipes", capsys=capsys, here=here, said="--json has no effect before recipes")


@pytest.mark.parametrize("option", ["--quality", "--repair", "--metric", "--select", "--budget"])
def test_an_empty_name_is_an_unknown_one(unopened, here, capsys, option):
    drop = () if option == "--budget" else DROP
    said = "budget `` cannot be read" if option == "--budget" else "`` is unknown; expected one of"
    bad("--model", unopened, *drop, option, "", capsys=capsys, here=here, said=said)


def test_every_rule_names_options_that_there_are():
    import typer

    from dropformer.cli import app

    known = {parameter.name for parameter in typer.main.get_command(app).params}
    assert {option for rule in clashes.RULES for option in rule.options} <= known
