"""The command line: every bad input is one line and exit status 2, and nothing is left behind."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import bad, run

import dropformer


@pytest.fixture
def model(lettered) -> Path:
    return lettered


SMALL = ("--samples", "3", "--length", "16", "--seconds", "0", "--quiet")


def test_the_whole_command_writes_a_checkpoint_and_a_report(model, here, capsys):
    status, out, err = run("--model", model, "--drop", "attn:1", *SMALL, capsys=capsys)
    assert (status, err) == (0, "")
    assert "perplexity" in out and "wrote llama-attn1" in out
    report = json.loads((here / "llama-attn1" / "report.json").read_text())
    assert report["pruned"]["checkpoint_bytes"] < report["dense"]["checkpoint_bytes"]
    assert report["pruned"]["kv_bytes_per_token"] * 4 == report["dense"]["kv_bytes_per_token"] * 3
    assert dropformer.load(here / "llama-attn1").config.num_hidden_layers == 4


def test_perplexity_of_texts_too_short_to_tell_what_windows_cost_says_so(model, here, capsys):
    _, out, _ = run("--model", model, "--drop", "window=1@4+1", *SMALL, "--out", "out", capsys=capsys)
    assert "tokens do not tell what windows cost at 8,192" in out
    assert "KV cache at 8,192 tokens" in out and "KV cache per token" not in out
    assert "`prune evaluate " in out and " out --long 8192`" in out
    assert "cost at 8,192 tokens was not measured" in (here / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", [".", "../llama", "../llama/.", "inner/.."])
def test_a_folder_is_called_by_its_name_however_it_is_reached(model, here, capsys, monkeypatch, name):
    (model / "inner").mkdir()
    monkeypatch.chdir(model)
    assert run("--model", name, "--drop", "attn=1", "--no-measure", "-q", capsys=capsys)[0] == 0
    assert "# llama, pruned (attn=1)" in (model / "llama-attn=1" / "README.md").read_text()
    assert run("analyze", name, "--samples", "3", "--length", "16", "-q", capsys=capsys)[0] == 0
    title = json.loads((model / "llama-scores" / "scores.json").read_text())["model"]["name"]
    assert Path(title).name == "llama"


def test_the_kv_cache_is_stated_in_the_checkpoints_own_type(model, here, capsys):
    dense = dropformer.open_model(model).model.to(torch.bfloat16)
    dense.save_pretrained(model)
    options = ("--drop", "attn=1", "--dtype", "float32", "--device", "cpu", *SMALL)
    status, out, _ = run("--model", model, *options, capsys=capsys)
    assert status == 0 and " 256 B │ " in out
    report = json.loads((here / "llama-attn=1" / "report.json").read_text())
    record = json.loads((here / "llama-attn=1" / "dropformer.json").read_text())
    keys_and_values = 4 * 2 * 2 * 8  # blocks, both, heads, width
    assert report["dense"]["kv_bytes_per_token"] == record["before"]["kv_bytes_per_token"] == 2 * keys_and_values
    assert report["pruned"]["kv_bytes_per_token"] == record["after"]["kv_bytes_per_token"]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("heldout", ("--drop", "attn:1"), "not calibrated on"),
        ("builtin", ("--drop", "attn:1"), "calibrated on too"),
        ("builtin", ("--drop", "attn=1"), "not calibrated on"),
        ("./a.txt", ("--drop", "attn:1", "--calibration", "a.txt"), "calibrated on too"),
        ("b.txt", ("--drop", "attn:1", "--calibration", "a.txt"), "not calibrated on"),
        ("b.txt", ("--drop", "attn:1", "--repair", "refit", "--calibration", "a.txt,b.txt"), "calibrated on too"),
    ],
)
def test_a_report_says_whether_its_text_was_calibrated_on(model, here, capsys, text, options, said):
    for name in ("a", "b"):
        (here / f"{name}.txt").write_text(f"a text called {name}, ".join(map(str, range(400))))
    small = ("--samples", "4", "--length", "16", "--seconds", "0", "-q", "--out", "out")
    status, out, err = run("--model", model, *options, "--text", text, *small, capsys=capsys)
    assert status == 0, err
    assert f"of `{text}`, {said};" in out
    report = json.loads((here / "out" / "report.json").read_text())
    assert report["text"]["calibrated_on"] == (said == "calibrated on too")


def test_json_is_all_that_stdout_holds(model, here, capsys):
    _, out, _ = run("--model", model, "--drop", "attn=1", "--json", *SMALL, capsys=capsys)
    assert json.loads(out)["dropped"] == {"attention": [1], "mlp": [], "blocks": []}


def test_scores_are_reused_for_the_same_weights_and_tokens(model, here, capsys):
    options = ("--samples", "3", "--length", "16")
    run("analyze", model, *options, capsys=capsys)
    status, _, err = run("analyze", model, *options, capsys=capsys)
    assert status == 0 and "scores: reused" in err
    _, _, err = run("analyze", model, "--samples", "4", "--length", "16", capsys=capsys)
    assert "scores: reused" not in err


def test_analyze_then_plan_then_prune_follows_the_plan(model, here, capsys):
    assert run("analyze", model, "--samples", "3", "--length", "16", "-q", capsys=capsys)[0] == 0
    assert (here / "llama-scores" / "similarity.png").read_bytes()[:4] == b"\x89PNG"
    status, out, _ = run("plan", "llama-scores/scores.json", "--drop", "joint:2", "--out", "plan.json", capsys=capsys)
    assert status == 0 and "parameters" in out
    assert run("--model", model, "--plan", "plan.json", "--out", "small", "-q", capsys=capsys)[0] == 0
    wanted = json.loads((here / "plan.json").read_text())["drops"]
    assert json.loads((here / "small" / "plan.json").read_text())["drops"] == wanted


def test_a_plan_is_followed_on_the_files_and_measured_if_asked(model, here, capsys):
    _, plan, _ = run("--model", model, "--drop", "attn=1", "--dry-run", "--json", *SMALL, capsys=capsys)
    (here / "plan.json").write_text(plan)
    status, out, _ = run("--model", model, "--plan", "plan.json", "--out", "one", "--verify", "-q", capsys=capsys)
    assert status == 0 and "not measured" in out and "parameters" in out
    assert not (here / "one" / "report.json").exists()
    measured = ("--measure", "--seconds", "0", "-q")
    status, out, _ = run("--model", model, "--plan", "plan.json", "--out", "two", *measured, capsys=capsys)
    assert status == 0 and "perplexity" in out
    assert json.loads((here / "two" / "report.json").read_text())["kl"] > 0
    weights = [(here / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_a_format_that_saves_nothing_says_so(model, here, capsys):
    status, out, _ = run("--model", model, "--drop", "attn=1", "--format", "dense", *SMALL, capsys=capsys)
    assert status == 0 and "saves nothing" in out and "+0.0%" in out


def test_a_plan_that_packs_is_made_and_its_cost_said(model, here, capsys):
    run("analyze", model, "--samples", "3", "--length", "16", "-q", capsys=capsys)
    scores = ("plan", "llama-scores/scores.json", "--packable")
    status, out, _ = run(*scores, "--drop", "joint:2", "--out", "plan.json", capsys=capsys)
    assert status == 0 and "packs into a stock model" in out
    run("--model", model, "--plan", "plan.json", "--out", "small", "-q", capsys=capsys)
    assert json.loads((here / "small" / "config.json").read_text())["model_type"] == "llama"
    bad(*scores, "--drop", "attn:2", capsys=capsys, here=here, said="joint:N with an even N")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--drop", "attn=1", "--format", "pickle"), "expected one of dropformer, dense"),
        (("--plan", "missing.json"), "missing.json does not exist"),
        (("--plan", "llama/config.json"), "is not a plan file"),
    ],
)
def test_a_wrong_format_or_plan(model, here, capsys, options, said):
    bad("--model", model, *options, "--out", "new", "-q", capsys=capsys, here=here, said=said)


def test_a_dry_run_writes_nothing(model, here, capsys):
    status, out, _ = run("--model", model, "--drop", "mlp:1", "--dry-run", *SMALL, capsys=capsys)
    assert status == 0 and "mlp:" in out and "→" in out
    assert not (here / "llama-mlp1").exists()


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ("attn", "cannot be read"),
        ("attn:9", "drops 9"),
        ("attn=4", "names attention layer 4"),
        ("joint:99", "drops 99"),
        ("encoder.attn:1", "no stack named `encoder`"),
        ("published:attn:1", "recipe"),
    ],
)
def test_a_wrong_drop_spec(model, here, capsys, drop, said):
    bad("--model", model, "--drop", drop, *SMALL, capsys=capsys, here=here, said=said)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--nosuch",), "No such option: --nosuch"),
        (("frobnicate",), "No such command 'frobnicate'; see `prune --help`"),
        (("analyze",), "Missing argument"),
        (("--model", "m", "--drop", "attn:1", "--samples", "x"), "Invalid value for '--samples'"),
    ],
)
def test_a_wrong_option_or_command(here, capsys, args, said):
    bad(*args, capsys=capsys, here=here, said=said)


def test_without_arguments_it_helps(here, capsys):
    status, out, _ = run(capsys=capsys)
    assert status == 0 and "--drop" in out


def test_an_unknown_model(here, capsys):
    bad("--model", "smollm", "--drop", "attn:1", capsys=capsys, here=here, said="smollm2-135m")


def test_no_network(here, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bad("--model", "nobody/nothing", "--drop", "attn:1", "-q", capsys=capsys, here=here, said="nobody/nothing")


def test_an_output_that_is_not_empty(model, here, capsys):
    (here / "full").mkdir()
    (here / "full" / "x").write_text("x")
    bad("--model", model, "--drop", "attn:1", "--out", "full", capsys=capsys, here=here, said="not an empty folder")


def test_a_truncated_safetensors_file(model, here, capsys):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    bad("--model", model, "--drop", "attn:1", capsys=capsys, here=here, said="model.safetensors")


def test_a_header_that_lies(model, here, capsys):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    bad("--model", model, "--drop", "attn:1", capsys=capsys, here=here, said="model.safetensors")


def test_an_index_that_points_outside(model, here, capsys):
    shutil.copy(model / "model.safetensors", here / "secret.safetensors")
    (model / "model.safetensors").rename(model / "part.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    bad("--model", model, "--drop", "attn:1", capsys=capsys, here=here, said="..")


def test_a_checkpoint_of_pickles_only(model, here, capsys):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    bad("--model", model, "--drop", "attn:1", capsys=capsys, here=here, said="safetensors")


@pytest.mark.parametrize(
    "config", ["{", "[]", "{}", '{"model_type": "nosuch"}', '{"model_type": "llama", "num_hidden_layers": -1}']
)
def test_a_config_without_what_it_needs(model, here, capsys, config):
    (model / "config.json").write_text(config)
    bad("--model", model, "--drop", "attn=1", "-q", capsys=capsys, here=here, said="config")


def test_calibration_text_that_is_not_there_or_too_short(model, here, capsys):
    bad(
        "--model", model, "--drop", "attn:1", "--calibration", "no.txt", capsys=capsys, here=here, said="does not exist"
    )
    (here / "short.txt").write_text("a few words")
    bad(
        "--model", model, "--drop", "attn:1", "--calibration", "short.txt", "-q",
        capsys=capsys, here=here, said="lower --samples",
    )  # fmt: skip


def test_a_wrong_dtype_or_device(model, here, capsys):
    bad("--model", model, "--drop", "attn=1", "--dtype", "int8", "-q", capsys=capsys, here=here, said="float32")
    bad("--model", model, "--drop", "attn=1", "--device", "tpu9", "-q", capsys=capsys, here=here, said="tpu9")


def test_no_space_left_ends_in_one_line_and_leaves_nothing(model, here, elsewhere):
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from dropformer import cli; cli.main()"
    )
    done = elsewhere(script, "--model", model, "--drop", "attn=1", "--seconds", "0", "-q", cwd=here)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert sorted(p.name for p in here.iterdir() if not p.name.startswith("cache")) == ["llama"]


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["--model", "nosuch", "--drop", "attn:1"],
        ["--model", "smollm2-135m", "--drop", "attn"],
    ],
)
def test_help_and_input_errors_import_nothing_heavy(args, here):
    script = (
        "import sys; sys.argv = ['prune', *sys.argv[1:]]\n"
        "from dropformer import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'lm_eval', 'matplotlib'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, cwd=here, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_five_lines_of_python(model, here):
    scores = dropformer.analyze(str(model), calibration=dropformer.Calibration(samples=3, length=16))
    plan = dropformer.plan(scores, "attn:1")
    small = dropformer.drop(str(model), plan)
    dropformer.save(small, here / "small")
    again = dropformer.load(here / "small")
    ids = torch.arange(3, 15)[None]
    assert torch.equal(again(ids).logits, small(ids).logits)
    assert (here / "small" / "model.safetensors").stat().st_size < (model / "model.safetensors").stat().st_size


QUALITY = (*SMALL, "--gate", "builtin")


@pytest.mark.parametrize("repair", ["linear", "refit"])
def test_a_repaired_model_is_exported_with_its_new_weights(model, here, capsys, repair):
    status, out, err = run("--model", model, "--drop", "attn:1", "--repair", repair, *QUALITY, capsys=capsys)
    assert (status, err) == (0, "") and "wrote llama-attn1" in out
    plan = json.loads((here / "llama-attn1" / "plan.json").read_text())
    assert len(plan["repairs"]) == 1 and repair in plan["repairs"][0]
    report = json.loads((here / "llama-attn1" / "report.json").read_text())
    assert report["pruned"]["parameters"] == plan["savings"]["parameters_after"]
    assert report["repair"]["passes"] > 0 and report["repair"]["extra_bytes"] >= 0
    assert "(dense " in plan["repairs"][0]  # how much of the loss came back
    dense = dict(dropformer.open_model(model).model.named_parameters())
    pruned = dict(dropformer.load(here / "llama-attn1").named_parameters())
    assert any(name not in dense or not torch.equal(tensor, dense[name]) for name, tensor in pruned.items())


def test_a_budget_takes_the_place_of_a_drop(model, here, capsys):
    status, _, _ = run("--model", model, "--budget", "kv:-25%", *SMALL, capsys=capsys)
    assert status == 0
    report = json.loads((here / "llama-kv-25pct" / "report.json").read_text())
    assert report["pruned"]["kv_bytes_per_token"] <= 0.75 * report["dense"]["kv_bytes_per_token"]


def test_a_given_plan_can_be_repaired(model, here, capsys):
    assert run("--model", model, "--drop", "attn=1", "--out", "one", *SMALL, capsys=capsys)[0] == 0
    options = ("--plan", "one/plan.json", "--repair", "linear", "--out", "two", *QUALITY)
    assert run("--model", model, *options, capsys=capsys)[0] == 0
    plan = json.loads((here / "two" / "plan.json").read_text())
    assert plan["repairs"] and plan["calibration"]["samples"] == int(QUALITY[QUALITY.index("--samples") + 1])
    _, _, err = run("--model", model, "--plan", "two/plan.json", "--dry-run", capsys=capsys)
    assert "add --repair to repeat them" in err


def test_a_given_plan_can_be_refined(model, here, capsys):
    assert run("--model", model, "--drop", "attn=0", "--out", "one", *SMALL, capsys=capsys)[0] == 0
    options = ("--plan", "one/plan.json", "--refine", "2", "--out", "two", *SMALL)
    assert run("--model", model, *options, capsys=capsys)[0] == 0
    before, after = (json.loads((here / name / "plan.json").read_text()) for name in ("one", "two"))
    assert [d["layer"] for d in before["drops"]] == ["attn:0"] != [d["layer"] for d in after["drops"]]
    assert after["metric"].endswith("refined") and len(after["drops"]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--budget", "kv:-25%", "--refine", "1"), "leave one out"),
        (("--drop", "attn:1", "--quality", "worst"), "`worst` is unknown"),
        (("--drop", "attn:1", "--metric", "x"), "`x` is unknown"),
        (("--budget", "kv:25%"), "budget `kv:25%` cannot be read"),
        (("--drop", "attn:1", "--budget", "kv:-25%"), "give only one of --drop, --plan, --budget and --draft"),
        (("--drop", "attn:1", "--repair", "linear", "--gate", "nowhere"), "text `nowhere` is unknown"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_line(model, here, capsys, options, said):
    bad("--model", model, *options, "-q", capsys=capsys, here=here, said=said)


def test_improve_drop_and_save_give_the_model_that_is_loaded(model, here, ids):
    from dropformer import Calibration
    from dropformer.metrics.search.strategy import Strategy

    opened = dropformer.open_model(model)
    plan, repair = dropformer.improve(opened, "attn:1", Strategy(repair=("linear",)), [Calibration("builtin", 3, 16)])
    pruned = dropformer.drop(opened, plan, repair)
    dropformer.save(pruned, here / "saved")
    with torch.no_grad():
        assert torch.equal(dropformer.load(here / "saved")(ids).logits, pruned(ids).logits)


def test_a_repaired_plan_that_is_repaired_again_counts_its_maps_once(model, here, capsys):
    options = ("--repair", "linear", *QUALITY)
    assert run("--model", model, "--drop", "attn=1", "--out", "one", *options, capsys=capsys)[0] == 0
    for name, repair in (("two", "linear"), ("three", "refit")):
        more = ("--plan", "one/plan.json", "--repair", repair, "--out", name, *QUALITY)
        assert run("--model", model, *more, capsys=capsys)[0] == 0
        plan, report = (json.loads((here / name / f"{file}.json").read_text()) for file in ("plan", "report"))
        assert plan["savings"]["parameters_after"] == report["pruned"]["parameters"]


def test_windows_to_fit_and_to_gate_on_are_no_longer_than_the_model_reads(tiny, model, here, capsys):
    short = here / "gpt2"
    tiny("gpt2", n_embd=32, n_layer=4, n_head=4, n_positions=64).save_pretrained(short)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, short)
    options = ("--drop", "attn:1", "--repair", "refit", "--samples", "4", "--seconds", "0", "--quiet")
    status, out, _ = run("--model", short, *options, capsys=capsys)
    assert status == 0 and "wrote gpt2-attn1" in out
    bad("--model", short, *options, "--length", "100", "--out", "x", capsys=capsys, here=here, said="smaller --length")


@pytest.mark.parametrize(("text", "samples", "first"), [("builtin, heldout", 4, 2), (" builtin ,heldout,", 5, 3)])
def test_texts_share_all_windows_and_spaces_and_a_last_comma_do_no_harm(model, here, capsys, text, samples, first):
    options = ("--drop", "attn:1", "--repair", "refit", "--samples", samples, "--length", "16", "--dry-run")
    status, _, err = run("--model", model, *options, "--calibration", text, capsys=capsys)
    assert status == 0 and f"calibration: builtin, {first} windows of 16; heldout, 2 windows of 16" in err


@pytest.mark.parametrize(("samples", "marks"), [(1, 0), (2, 3)])
def test_one_window_has_no_spread_to_state(model, here, capsys, samples, marks):
    assert run("--model", model, "--drop", "attn=1", "--out", "out", *SMALL, capsys=capsys)[0] == 0
    options = ("--samples", samples, "--length", "16", "--no-probes", "-q")
    status, out, _ = run("evaluate", model, "out", *options, capsys=capsys)
    assert status == 0 and out.count("±") == marks


@pytest.mark.parametrize("option", ["--text", "--gate"])
def test_a_text_that_is_too_short_is_said_before_anything_is_chosen(model, here, capsys, option):
    (here / "short.txt").write_text("too short")
    options = ("--drop", "attn:1", "--repair", "refit", option, "short.txt", "--samples", "4", "--length", "16")
    before = sorted(here.iterdir())
    status, out, err = run("--model", model, *options, capsys=capsys)
    assert (status, out) == (2, "") and sorted(p for p in here.iterdir() if p.name != "cache") == before
    assert f"{option}: " in err.splitlines()[-1] and "choosing" not in err and "dropping" not in err


def test_reused_scores_bear_the_name_of_the_model_at_hand(model, here, capsys):
    shutil.copytree(model, here / "copy")
    for name in (model, here / "copy"):
        assert run("--model", name, "--drop", "attn:1", *SMALL, capsys=capsys)[0] == 0
    for file in ("report", "plan", "dropformer"):
        assert Path(json.loads((here / "copy-attn1" / f"{file}.json").read_text())["model"]["name"]).name == "copy"


@pytest.mark.parametrize("rungs", ["drop,window:4+1", "drop,window:4+fold"])
def test_a_budget_over_rungs_windows_layers_and_states_the_cache_at_the_context(model, here, capsys, rungs):
    options = ("--budget", "kv:-50%", "--rungs", rungs, "--context", "64", "--out", "out", *SMALL)
    status, out, err = run("--model", model, *options, capsys=capsys)
    assert (status, err) == (0, "") and "KV cache at 8,192 tokens" in out
    plan = json.loads((here / "out" / "plan.json").read_text())
    assert plan["windows"] and plan["spec"] == "kv:-50%"
    assert "fold" in rungs or "recall" in plan["calibration"]["name"]  # constants are fitted on plain text
    report = json.loads((here / "out" / "report.json").read_text())
    assert report["pruned"]["kv_bytes"] <= 0.5 * report["dense"]["kv_bytes"]
    named = dict(dropformer.load(here / "out").named_parameters())
    assert any("sink_values" in name for name in named) == ("fold" in rungs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--drop", "attn:1", "--rungs", "drop,window:4"), "--rungs has no effect without a budget or --draft"),
        (
            ("--budget", "kv:-9%", "--rungs", "drop,window:4", "--metric", "angular"),
            "--metric has no effect with --rungs",
        ),
        (("--budget", "kv:-9%", "--rungs", "window:64", "--context", "64"), "saves nothing at 64 tokens"),
        (("--budget", "measured:1.2x", "--rungs", "window:4"), "rungs are told by bytes"),
    ],
)
def test_rungs_without_use_are_refused(model, here, capsys, options, said):
    bad("--model", model, *options, capsys=capsys, here=here, said=said)


def test_linear_maps_are_named_in_a_drop_and_in_a_plan(model, here, capsys):
    status, _, err = run("--model", model, "--drop", "attn=0,linear:1", "--out", "one", *SMALL, capsys=capsys)
    assert status == 0 and err.startswith("warning: the attention of block 0 is dropped") and err.count("\n") == 1
    plan, record, report = (
        json.loads((here / f"one/{name}.json").read_text()) for name in ("plan", "dropformer", "report")
    )
    assert record["maps"] == plan["maps"] and len(plan["maps"]) == 1 and not plan["repairs"]
    assert report["pruned"]["parameters"] == plan["savings"]["parameters_after"]
    assert run("--model", model, "--plan", "one/plan.json", "--out", "two", *SMALL, capsys=capsys)[0] == 0
    files = [dict(dropformer.load(here / name).named_parameters()) for name in ("one", "two")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    bad("--model", model, "--plan", "one/plan.json", "--format", "deci", "--out", "x", capsys=capsys, here=here,
        said="--format deci has no place for linear maps")  # fmt: skip
    bad("--model", model, "--drop", "linear:1", "--refine", "1", "--out", "x", *SMALL, capsys=capsys, here=here,
        said="would not know which are to be maps")  # fmt: skip


def test_a_budget_may_choose_linear_maps(model, here, capsys):
    options = (
        "--budget",
        "kv:-50%",
        "--rungs",
        "linear,window:4+1",
        "--context",
        "64",
        "--seconds",
        "0",
        "--samples",
        "3",
    )
    assert run("--model", model, *options, "--out", "one", "--quiet", capsys=capsys)[0] == 0
    plan, record = (json.loads((here / f"one/{name}.json").read_text()) for name in ("plan", "dropformer"))
    assert plan["maps"] == record["maps"] and plan["savings"]["kv_after"] < plan["savings"]["kv"]
