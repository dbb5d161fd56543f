"""Types that only a checkpoint's own code knows: pruned by the command, loaded anywhere by trust_remote_code alone."""

import json

import own_code
import pytest
import torch
from command import run

import dropformer
from dropformer.prune.errors import CheckpointError

PLAIN = """
import shutil, sys, torch
from transformers import AutoModelForCausalLM

def gives(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        print("GIVES", float(model(torch.arange(3, 15)[None]).logits.double().abs().sum()))
    return model

for folder in sys.argv[1:]:
    gives(folder).save_pretrained(folder + "-again")
    shutil.rmtree(folder)
import dropformer
for folder in sys.argv[1:]:
    gives(folder + "-again")
"""


@pytest.fixture
def home(here, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(here / "modules"))
    return own_code.write(here / "home")


def total(model):
    with torch.no_grad():
        return float(model(torch.arange(3, 15)[None]).logits.double().abs().sum())


def test_it_is_pruned_and_loads_elsewhere_with_its_code_beside_it_also_after_saving_again(
    home, here, elsewhere, capsys
):
    for spec, out in (("attn=1,mlp=2", here / "skipped"), ("block=1", here / "packed")):
        args = ("--model", home, "--drop", spec, "--out", out, "--trust-remote-code", "--no-measure", "-q")
        status, _, err = run(*args, capsys=capsys)
        assert status == 0, err
    kept = {path.name for path in (here / "skipped").iterdir()}
    assert kept >= {"configuration_home.py", "modeling_home.py", "parts_home.py", "own_code.py"}
    assert json.loads((here / "skipped/config.json").read_text())["model_type"] == "dropformer_remote"
    folders = [here / "skipped", here / "packed"]
    want = [total(dropformer.load(folder, trust_remote_code=True).eval()) for folder in folders]
    assert want[0] != pytest.approx(want[1], rel=1e-4)
    done = elsewhere(PLAIN, *folders)
    assert done.returncode == 0, done.stderr
    got = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("GIVES")]
    assert got == pytest.approx([*want, *want], rel=1e-6)


def test_by_a_plan_none_of_its_code_runs_and_the_checkpoint_is_the_same(home, here, capsys):
    base = ("--model", home, "--no-measure", "-q", "--trust-remote-code")
    assert run(*base, "--drop", "attn=1", "--out", here / "a", capsys=capsys)[0] == 0
    (home / "modeling_home.py").write_text("raise SystemError('ran')")
    status, _, err = run("--model", home, "--plan", here / "a/plan.json", "--out", here / "b", "-q", capsys=capsys)
    assert status == 0, err
    mine, theirs = (json.loads((here / name / "config.json").read_text()) for name in "ab")
    assert mine == theirs


def test_without_trust_it_is_refused_in_a_line_before_anything_runs(home, here, capsys):
    status, out, err = run("--model", home, "--drop", "attn=1", "--out", here / "out", "-q", capsys=capsys)
    assert status == 2 and "--trust-remote-code" in err and err.count("\n") == 1 and not out
    args = ("--model", home, "--drop", "attn=1", "--out", here / "out", "--trust-remote-code", "--no-measure", "-q")
    assert run(*args, capsys=capsys)[0] == 0
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        dropformer.load(here / "out")
