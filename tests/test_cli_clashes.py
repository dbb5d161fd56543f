"""Options that would be ignored, and arguments that are known to be wrong, are one line before anything is loaded."""

import json
import os

import pytest
import torch
from command import bad, run
from tiny_gguf import tiny_llama, write_gguf

import dropformer
from dropformer import validate
from dropformer.prune.formats.writing import ExportOptions
from dropformer.recipes.source import check_model
from dropformer.request import Request, Target


@pytest.fixture
def unopened(llama_folder, here, monkeypatch):
    """A tiny Llama that no command may open: what is wrong is said before."""

    def opened(*args, **kwargs):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("dropformer.recipes.opening.open_source", opened)
    return llama_folder


PLAN = ("--plan", "plan.json")
DROP = ("--drop", "attn:1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((*PLAN, "--keep", "0"), "--keep has no effect with --plan, which names the layers; leave it out"),
        ((*PLAN, "--scores", "scores.json"), "--scores has no effect with --plan"),
        ((*PLAN, "--metric", "angular", "--repair", "refit"), "--metric has no effect with --plan"),
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
        ((*DROP, "--batch-size", "2", "--metric", "angular"), "--batch-size has no effect with --quality"),
        ((*DROP, "--batch-size", "1", "--refine", "1"), "--batch-size has no effect with --quality"),
        ((*DROP, "--gate", "builtin"), "--gate has no effect where nothing is repaired"),
        ((*DROP, "--gate", "builtin", "--metric", "angular"), "--gate has no effect where nothing is repaired"),
        ((*DROP, "--format", "gguf", "--link"), "--link has no effect with --format gguf"),
        ((*DROP, "--format", "onnx", "--link"), "--link has no effect with --format onnx"),
        ((*DROP, "--metric", "angular", "--select", "greedy"), "--metric has no effect where a greedy search chooses"),
        ((*DROP, "--metric", "angular", "--quality", "best"), "leave it out or add --select one-shot"),
        (("--budget", "kv:-25%", "--metric", "angular"), "--metric has no effect with --budget"),
        (("--budget", "kv:-25%", "--select", "greedy"), "--select has no effect with --budget"),
        (("--drop", "window=1@8+2", "--repair", "refit"), "--repair has no effect beside windows or agents in --drop"),
        (("--drop", "attn=1,window=2@8", "--refine", "1"), "repair the plan that --dry-run --json prints, by --plan"),
        ((*DROP, "--no-measure", "--text", "builtin"), "--text has no effect with --no-measure"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(unopened, here, capsys, options, said):
    bad("--model", unopened, *options, "-q", capsys=capsys, here=here, said=said)


@pytest.mark.parametrize("others", [("--plan", "p"), ("--budget", "kv:-25%"), ("--plan", "p", "--budget", "x")])
def test_what_to_drop_is_said_once(unopened, here, capsys, others):
    said = "give only one of --drop, --plan, --budget and --draft"
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
    assert {option for rule in validate.RULES for option in rule.options} <= known


LINEAR = ("--repair", "linear")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((*DROP, "--text", "nowhere"), "text `nowhere` is unknown"),
        ((*DROP, "--text", ""), "text `` is unknown"),
        ((*DROP, "--text", "no.txt"), "no.txt does not exist"),
        ((*DROP, *LINEAR, "--gate", "nowhere"), "text `nowhere` is unknown"),
        ((*DROP, "--quality", "best", "--memory", "2GiB", "--calibration", "self"), "which --memory does not load"),
        ((*DROP, "--quality", "best", "--memory", "2GiB", "--gate", "self"), "`self` is written by the whole model"),
        ((*DROP, "--format", "gguf"), "--format gguf cuts a .gguf file"),
        ((*DROP, "--keep", "0,4"), "--keep names block 4, but the blocks are 0 to 3"),
        (("--budget", "kv:-25%", "--keep", "-5"), "--keep names block -5, but the blocks are 0 to 3"),
        ((*DROP, "--keep", "x"), "--keep `x` cannot be read"),
        (("--drop", "attn=1", "--scores", "no.json"), "no.json does not exist; expected a scores file"),
        (("--drop", "attn=1", "--scores", "llama/config.json"), "is not a scores file"),
        (("--plan", "no.json", "--measure"), "no.json does not exist; expected a plan file"),
        ((*DROP, "--format", "deci", *LINEAR), "--format deci has no place for linear maps"),
        ((*DROP, "--format", "dense", "--quality", "linear"), "--format dense has no place for linear maps"),
        (("--budget", "kv:-25%", "--format", "dense", *LINEAR), "--format dense has no place for linear maps"),
        (("--drop", ""), "drop spec `` cannot be read"),
        (("--draft", "--rungs", ""), "--rungs names none"),
    ],
)
def test_an_argument_known_to_be_wrong_is_refused_before_the_model_is_opened(unopened, here, capsys, options, said):
    bad("--model", unopened, *options, "-q", capsys=capsys, here=here, said=said)


def test_a_gguf_is_not_made_of_what_is_fetched_as_safetensors(unopened, here, capsys):
    options = (*DROP, "--format", "gguf")
    bad("--model", "nobody/nothing", *options, capsys=capsys, here=here, said="nobody/nothing is none")


def test_onnx_without_its_packages_is_refused_before_the_model_is_opened(unopened, here, capsys, monkeypatch):
    monkeypatch.setattr("dropformer.prune.formats.onnx.NEEDS", ("no_such_package",))
    said = "--format onnx needs no_such_package; pip install 'dropformer[onnx]'"
    bad("--model", unopened, *DROP, "--format", "onnx", capsys=capsys, here=here, said=said)


@pytest.mark.parametrize("drop", ["attn:1", "mlp:1,mlp=0"])
def test_a_family_that_deci_cannot_carry_is_refused_before_the_model_is_opened(unopened, here, capsys, drop):
    config = json.loads((unopened / "config.json").read_text())
    (unopened / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    said = "norms its queries and keys, which DeciLM cannot carry"
    bad("--model", unopened, "--drop", drop, "--format", "deci", capsys=capsys, here=here, said=said)


@pytest.mark.parametrize("drop", ["block:1", "joint:2", "attn=1,mlp=1"])
def test_a_plan_that_may_pack_needs_no_family_of_decis(llama_folder, here, drop):
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    validate.validate(Request(str(llama_folder), Target(drop), export=ExportOptions("deci")))


def test_what_is_pruned_already_is_not_pruned_or_swept_again_but_may_be_analyzed(llama_folder, here, capsys):
    options = ("--drop", "attn=1", "--no-measure", "--out", "once", "-q")
    assert run("--model", llama_folder, *options, capsys=capsys)[0] == 0
    said = "once is pruned already; prune the dense model that it was made from"
    bad("--model", "once", *DROP, "-q", capsys=capsys, here=here, said=said)
    bad("--model", "once", "--drop", "attn:4", "--out", "once", capsys=capsys, here=here, said="once ")
    bad("sweep", "once", "--drop", "attn:0..2", "-q", capsys=capsys, here=here, said=said)
    check_model("once")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("sweep", "--drop", "attn:0..2", "--text", "nowhere"), "text `nowhere` is unknown"),
        (("sweep", "--drop", "attn:0..2", "--keep", "4"), "--keep names block 4"),
        (("evaluate", "--text", "builtin,heldout"), "text `builtin,heldout` is unknown"),
    ],
)
def test_other_commands_check_their_arguments_first_too(unopened, here, capsys, command, said):
    bad(command[0], unopened, *command[1:], capsys=capsys, here=here, said=said)


COMMANDS = [
    ("analyze",),
    ("evaluate",),
    ("compare",),
    ("sweep", "--drop", "attn:0..2"),
    ("--drop", "attn:1", "--model"),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("llama/config.json", "llama/config.json is a file; choose another --out"),
        ("llama/config.json/x/y", "config.json is a file, and llama/config.json/x/y would lie in it; choose another"),
        ("", "--out is empty"),
        ("x" * 300, "cannot be written (File name too long)"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_the_work(unopened, here, capsys, command, out, said):
    bad(*command, unopened, "--out", out, capsys=capsys, here=here, said=said)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_lets_nobody_write_is_said_before_the_work(unopened, here, capsys, command):
    (here / "closed").mkdir(mode=0o500)
    bad(*command, unopened, "--out", "closed/x", capsys=capsys, here=here, said="no permission to write in")


def test_a_plan_is_not_written_over_a_folder_or_nowhere(llama_folder, here, capsys):
    opened = dropformer.open_model(llama_folder)
    batch = torch.arange(3, 15)[None]
    scores = dropformer.analyze(opened.model, [{"input_ids": batch}])
    scores.write(here / "scores.json")
    (here / "folder").mkdir()
    command = ("plan", "scores.json", "--drop", "attn:1", "--out")
    bad(*command, "folder", capsys=capsys, here=here, said="folder is a folder, not a place for a plan file")
    bad(*command, "llama/config.json/x", capsys=capsys, here=here, said="cannot be written")
    bad(*command, "", capsys=capsys, here=here, said="--out is empty")


def test_a_gguf_that_lacks_layers_is_llama_cpps_and_not_loaded(here, capsys):
    write_gguf(here / "x.gguf", tiny_llama())
    options = ("--drop", "attn=1", "--format", "gguf", "--no-measure", "--out", "out", "-q")
    assert run("--model", "x.gguf", *options, capsys=capsys)[0] == 0
    said = "out/x-pruned.gguf is a pruned model, as --format gguf writes it: llama.cpp runs it, but dropformer"
    bad("evaluate", "x.gguf", "out/x-pruned.gguf", "-q", capsys=capsys, here=here, said=said)
    bad("analyze", "out/x-pruned.gguf", "-q", capsys=capsys, here=here, said="dropformer does not load it")
    (here / "y.gguf").write_bytes((here / "x.gguf").read_bytes()[:200])
    bad("evaluate", "x.gguf", "y.gguf", "-q", capsys=capsys, here=here, said="y.gguf is")


def test_zeros_in_a_gguf_load_again_and_belong_to_that_format(here, capsys):
    write_gguf(here / "x.gguf", tiny_llama())
    options = ("--drop", "attn=1", "--no-measure", "--out", "out", "-q", "--dense")
    said = "--dense belongs to --format gguf, and this is --format dropformer"
    bad("--model", "x.gguf", *options, capsys=capsys, here=here, said=said)
    assert run("--model", "x.gguf", *options, "--format", "gguf", capsys=capsys)[0] == 0
    assert json.loads((here / "out" / "dropformer.json").read_text())["format"] == "gguf-dense"
    assert run("evaluate", "out/x-zeros.gguf", "--samples", "1", "--length", "16", "-q", capsys=capsys)[0] == 0


@pytest.mark.parametrize("command", [*COMMANDS[:1], *COMMANDS[2:]])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("builtin,heldout", "`builtin,heldout` names several texts, which need `prune` with --quality or --repair"),
        (" , ", "--calibration names no text"),
        ("", "--calibration names no text"),
    ],
)
def test_several_texts_need_a_search_or_a_repair_and_none_is_not_a_text(unopened, here, capsys, command, text, said):
    bad(*command, unopened, "--calibration", text, capsys=capsys, here=here, said=said)
