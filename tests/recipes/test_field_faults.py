"""Faults from the field, each as one command: the right thing, or one clear line and nothing half-written."""

import json
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from command import bad, run
from safetensors.torch import load_file, save_file
from transformers import Dinov2Backbone, Dinov2Config

from dropformer.prune.errors import CheckpointError
from dropformer.prune.loading.load import load
from dropformer.recipes.hub import fetch_snapshot

FIRST = ("--drop", "attn=1", "--no-measure", "-q")


@contextmanager
def files_up_to(size):
    """A disk that is full once a file has this many bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def adapter(folder):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return folder


def test_an_adapter_alone_is_called_one_by_every_command(tmp_path, capsys):
    only = adapter(tmp_path / "only")
    for command in ("estimate", "analyze", "--model"):
        more = () if command == "analyze" else ("--drop", "attn=1")
        bad(
            command,
            only,
            *more,
            capsys=capsys,
            here=tmp_path,
            said="is an adapter, not a model; merge it into its model",
        )


def test_weights_saved_with_an_adapter_among_them_are_refused_with_what_to_do(llama_folder, tmp_path, capsys):
    weights = llama_folder / "model.safetensors"
    save_file({f"base_model.model.{name}": t for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    bad("--model", llama_folder, *FIRST, "--out", tmp_path / "out", capsys=capsys, here=tmp_path, said="merge it first")


def test_an_adapter_on_the_hub_is_refused_before_anything_is_downloaded(monkeypatch):
    class File:
        def __init__(self, name):
            self.rfilename = name

    class Info:
        siblings = [File("config.json"), File("model.safetensors"), File("adapter_config.json")]

    monkeypatch.setattr("huggingface_hub.model_info", lambda *_, **__: Info)
    with pytest.raises(CheckpointError, match="adapter beside the model"):
        fetch_snapshot("org/model")


def test_weights_that_are_not_the_models_are_listed(llama_folder, tmp_path, capsys):
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copy(llama_folder / "model.safetensors", llama_folder / name)
    status, out, err = run("--model", llama_folder, *FIRST[:-1], "--out", tmp_path / "out", capsys=capsys)
    assert status == 0, err
    assert "not copied" in out + err and "consolidated.safetensors" in out + err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_cache_that_cannot_be_written_is_said_when_quiet_too(lettered, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DROPFORMER_CACHE", str(tmp_path / "file"))
    more = ("--samples", 1, "--length", 16, "-q")
    status, _, err = run("analyze", lettered, *more, "--out", tmp_path / "scores", capsys=capsys)
    assert (status, err.startswith("warning: the scores are not kept")) == (0, True), err


@pytest.mark.parametrize("command", ["evaluate", "analyze"])
def test_a_full_disk_leaves_no_half_of_a_report(lettered, tmp_path, capsys, command):
    out, more = tmp_path / "out", ("--samples", 1, "--length", 16, "-q")
    with files_up_to(600):
        status, _, err = run(command, lettered, *more, "--out", out, capsys=capsys)
    last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith("prune: ") and "free some space" in last and "Traceback" not in err, err
    assert not out.exists()


def test_a_folder_in_place_of_scores_and_an_empty_name_are_one_line(llama_folder, tmp_path, capsys):
    bad(
        "plan", llama_folder, "--drop", "attn=1", capsys=capsys, here=tmp_path, said="is a folder; give the scores.json"
    )
    bad("--model", "", "--drop", "attn=1", capsys=capsys, here=tmp_path, said="the model's name is empty")


def test_an_unknown_value_deep_in_a_config_is_told_with_its_field(llama_folder, tmp_path, capsys):
    path = llama_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": {"rope_type": "none"}}))
    bad("--model", llama_folder, *FIRST, "--out", tmp_path / "out", capsys=capsys, here=tmp_path, said="`rope_type`")


def test_a_backbone_that_returns_several_feature_maps_is_pruned_and_measured(here, capsys):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    Dinov2Backbone(Dinov2Config(**size, out_features=["stage2", "stage4"])).save_pretrained(here / "dense")
    status, _, err = run("--model", here / "dense", "--drop", "block=2", "--out", here / "out", "-q", capsys=capsys)
    assert status == 0, err
    dense, pixels = Dinov2Backbone.from_pretrained(here / "dense").eval(), torch.rand(1, 3, 32, 32)
    for scale in (dense.encoder.layer[2].layer_scale1, dense.encoder.layer[2].layer_scale2):
        scale.lambda1.data.zero_()
    maps, kept = dense(pixels).feature_maps, load(here / "out")(pixels).feature_maps
    assert len(maps) == 2 and all(map(torch.allclose, maps, kept))


def test_a_name_that_is_no_unicode_is_one_line(llama_folder, here, capsys):
    bad("--model", llama_folder, *FIRST, "--out", here / "caf\udce9", capsys=capsys, here=here, said="is not UTF-8")


def test_processes_that_cannot_be_met_are_one_line(lettered, here, monkeypatch, capsys):
    # accelerate writes the last three into the environment, which they must leave with the test
    launch = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    more = ("--samples", 1, "--length", 16, "--out", here / "scores", "-q")
    bad("analyze", lettered, *more, capsys=capsys, here=here, said="WORLD_SIZE says that 2 processes run")


@pytest.mark.parametrize("field, value", [("num_hidden_layers", 10**7), ("hidden_size", -32)])
def test_an_estimate_of_an_impossible_config_is_one_line_at_once(llama_folder, here, capsys, field, value):
    path = llama_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    bad("estimate", llama_folder, "--drop", "attn=1", capsys=capsys, here=here, said="config")
