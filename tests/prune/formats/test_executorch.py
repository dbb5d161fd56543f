"""The format `executorch`: what ExecuTorch's Llama model reads, and refusals of what it would ignore."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import dropformer
from dropformer.prune.engines.registry import engines
from dropformer.prune.errors import ArchitectureError

PYTHON = os.environ.get("DROPFORMER_EXECUTORCH_PYTHON", "")
RUNNER = Path(__file__).parents[2] / "makers" / "executorch_run.py"
IDS = [5, 6, 40, 7, 7, 19, 33, 60]
SPECS = ("attn=0,2", "attn=1,mlp=2,block=3", "block=1")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
CASES = [(family, spec, {}) for family in ("llama", "qwen2", "qwen3") for spec in SPECS]
CASES += [
    ("mistral", "attn=0,2", {"sliding_window": None}),
    ("llama", "attn=3", {"rope_parameters": LLAMA3, "max_position_embeddings": 64}),
    ("llama", "mlp=0", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("qwen3", "attn=1", {"tie_word_embeddings": True}),
]


@pytest.fixture
def written(lively, pruned_in_memory, tmp_path):
    """A pruned model, written for ExecuTorch, and its folder."""

    def make(number: int, family: str, spec: str, **changes):
        pruned = pruned_in_memory(lively(tmp_path / f"dense-{number}", family, **changes), spec)
        dropformer.save(pruned, tmp_path / f"out-{number}", "executorch")
        return pruned, tmp_path / f"out-{number}"

    return make


def params_of(folder):
    return json.loads((folder / "params.json").read_text())


def test_params_say_which_blocks_lack_what(written):
    params = params_of(written(0, "llama", "attn=1,mlp=2,block=3")[1])
    assert params["n_layers"] == 3
    assert params["layer_types"] == ["full_attention", "skip_attention", "full_attention"]
    assert params["mlp_type"] == ["default", "default", "skip"]
    assert "layer_types" not in params_of(written(1, "llama", "block=1")[1])


def test_weights_are_the_models_and_a_dropped_mlp_is_zeros(written):
    pruned, folder = written(0, "qwen2", "attn=1,mlp=2")
    weights = torch.load(folder / "model.pth", weights_only=True)
    assert torch.equal(weights["layers.2.attention.wq.bias"], pruned.model.layers[2].self_attn.q_proj.bias)
    assert torch.equal(weights["layers.0.feed_forward.w2.weight"], pruned.model.layers[0].mlp.down_proj.weight)
    assert not any(name.startswith(("layers.1.attention.", "layers.1.attention_norm")) for name in weights)
    assert not weights["layers.2.feed_forward.w2.weight"].any()


def test_weights_keep_the_type_of_the_source(lively, pruned_in_memory, tmp_path):
    dropformer.save(
        pruned_in_memory(lively(tmp_path / "d", "llama", dtype="bfloat16"), "attn=1"), tmp_path / "o", "executorch"
    )
    kinds = {tensor.dtype for tensor in torch.load(tmp_path / "o" / "model.pth", weights_only=True).values()}
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize(
    "family, changes, said",
    [
        ("gemma2", {}, "not computed by ExecuTorch"),
        ("mistral", {"sliding_window": 4}, "sliding window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, "sliding window"),
        ("llama", {"attention_bias": True}, "no bias behind attention"),
        ("llama", {"mlp_bias": True}, "no place for"),
        ("llama", {"hidden_act": "gelu"}, "use silu"),
        ("llama", {"rope_parameters": DYNAMIC}, "depends on the length"),
    ],
)  # fmt: skip
def test_what_its_model_would_ignore_is_refused(written, family, changes, said, tmp_path):
    with pytest.raises(ArchitectureError, match=said):
        written(0, family, "attn=1", **changes)
    assert not (tmp_path / "out-0").exists()


def test_prune_engines_prints_the_command_of_its_exporter(written):
    answer = engines(written(0, "llama", "attn=1")[1])["engines"]["executorch"]
    assert answer["loads"] and "base.params=" in answer["command"] and "KV cache -25.0%" in answer["saves"]


engine = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON, reason="DROPFORMER_EXECUTORCH_PYTHON does not name a Python that has ExecuTorch"),
]


def in_executorch(tmp_path, *folders, how="eager"):
    command = [PYTHON, RUNNER, how, tmp_path / "found.pt", json.dumps(IDS), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(tmp_path / "found.pt", weights_only=True)


def logits(pruned):
    return pruned(torch.tensor([IDS])).logits[0].detach()


@pytest.mark.parametrize("case", [pytest.param(CASES, marks=engine)], ids=["every family and plan"])
def test_executorch_gives_torchs_logits_with_and_without_a_cache(written, tmp_path, case):
    made = [written(number, family, spec, **changes) for number, (family, spec, changes) in enumerate(case)]
    found = in_executorch(tmp_path, *(folder for _, folder in made))
    for what, (pruned, folder) in zip(case, made, strict=True):
        assert found[folder.name] == pytest.approx(logits(pruned).expand(2, -1, -1), abs=1e-4), what


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(CASES[0], marks=engine)], ids=["llama"])
def test_its_runtime_gives_torchs_logits_for_the_exported_program(written, tmp_path, case):
    family, spec, changes = case
    pruned, folder = written(0, family, spec, **changes)
    assert in_executorch(tmp_path, folder, how="pte")[folder.name] == pytest.approx(logits(pruned), abs=1e-4)
