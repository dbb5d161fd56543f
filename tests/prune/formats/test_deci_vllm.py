"""vLLM itself, on the CPU, runs deci checkpoints and gives the pruned model's log-probabilities.

DROPFORMER_VLLM_PYTHON names the interpreter of an environment with vLLM, which pins other versions than ours:

    make test-vllm
    DROPFORMER_VLLM_PYTHON=vllm-env/bin/python pytest -m engine tests/prune/formats/test_deci_vllm.py
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import dropformer

PYTHON = os.environ.get("DROPFORMER_VLLM_PYTHON", "")
ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON, reason="DROPFORMER_VLLM_PYTHON does not name a Python that has vLLM"),
]
# vLLM's attention on the CPU takes heads whose width is a multiple of 32.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "llama": ("llama", {"intermediate_size": 80}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 64}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
}
SPECS = {"attention": "attn=1,3", "mlp": "mlp=0,2,3", "both": "attn=1,3,mlp=2,3", "first": "block=0,attn=2"}
EVERY = [(model, spec) for model in ("llama", "mistral", "qwen2") for spec in SPECS]
EVERY += [("llama3", "attention"), ("biased", "attention")]
PROMPTS = [list(range(5, 17)), [40, 7, 7, 19], [63, 3]]
STEPS = 6

RUN = """
import gc, json, sys
from vllm import LLM, SamplingParams

def run(folder):
    llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, seed=0,
              trust_remote_code=work["trust"], distributed_executor_backend="uni")
    ask = SamplingParams(temperature=0, max_tokens=work["steps"], prompt_logprobs=0, detokenize=False, ignore_eos=True)
    for out in llm.generate([{"prompt_token_ids": ids} for ids in work["prompts"]], ask, use_tqdm=False):
        scores = [entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:])]
        yield {"logprobs": scores, "tokens": list(out.outputs[0].token_ids)}

work, found = json.loads(sys.argv[1]), {}
for folder in work["folders"]:
    try:
        found[folder] = list(run(folder))
    except Exception as error:
        found[folder] = str(error)
    gc.collect()
print("\\nFOUND" + json.dumps(found))
"""


def in_vllm(folders: list[Path], trust: bool, tmp_path: Path, site: Path | None = None) -> dict[str, list | str]:
    """What vLLM gives for each checkpoint, or its error; `site` is a folder with an installed dropformer."""
    work = {"folders": list(map(str, folders)), "trust": trust, "prompts": PROMPTS, "steps": STEPS}
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"PYTHONPATH": str(site)} if site else {}
    command = [PYTHON, "-c", RUN, json.dumps(work)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert "\nFOUND" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("\nFOUND")[2])
    return {Path(folder).name: result for folder, result in found.items()}


@pytest.fixture(scope="module")
def checkpoints(lively, write_deci, tmp_path_factory):
    """Folder and pruned model in memory for every pair of a model and drops."""
    root = tmp_path_factory.mktemp("deci")
    dense = {name: lively(root / name, family, **WIDE | changes) for name, (family, changes) in MODELS.items()}
    return {(n, s): (root / f"{n}-{s}", write_deci(dense[n], SPECS[s], root / f"{n}-{s}")) for n, s in EVERY}


@pytest.fixture(scope="module")
def default_format(lively, pruned_in_memory, tmp_path_factory):
    root = tmp_path_factory.mktemp("default")
    dropformer.save(pruned_in_memory(lively(root / "dense", "llama", **WIDE), "attn=1,3"), root / "default")
    return root / "default"


@pytest.fixture(scope="module")
def by_remote_code(checkpoints, default_format, tmp_path_factory):
    folders = [folder for folder, _ in checkpoints.values()]
    return in_vllm([*folders, default_format], True, tmp_path_factory.mktemp("trusting"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """dropformer alone, installed by the environment's own pip, its entry points included."""
    root = tmp_path_factory.mktemp("install")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "demo", "__pycache__", "*.egg-info", "tests")
    shutil.copytree(ROOT, root / "source", ignore=ignored)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(root / "site"), str(root / "source")], check=True, capture_output=True)
    return root / "site"


@pytest.fixture(scope="module")
def by_plugin(checkpoints, default_format, site, tmp_path_factory):
    folders = [checkpoints[pair][0] for pair in (("llama", "both"), ("qwen2", "attention"))]
    return in_vllm([*folders, default_format], False, tmp_path_factory.mktemp("plugged"), site)


def expected(model, ids: list[int]) -> tuple[list[float], list[int]]:
    """Log-probability of each token after the first, and the greedy continuation, by torch without a cache."""
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        tokens = list(ids)
        for _ in range(STEPS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return [float(scores[i, token]) for i, token in enumerate(ids[1:])], tokens[len(ids) :]


def assert_same(found, model) -> None:
    assert isinstance(found, list), found
    for result, ids in zip(found, PROMPTS, strict=True):
        scores, tokens = expected(model, ids)
        assert result["logprobs"] == pytest.approx(scores, abs=5e-5)
        assert result["tokens"] == tokens


@pytest.mark.parametrize("pair", EVERY, ids="-".join)
def test_vllm_gives_the_pruned_models_log_probabilities_and_greedy_tokens(checkpoints, by_remote_code, pair):
    folder, pruned = checkpoints[pair]
    assert_same(by_remote_code[folder.name], pruned)


@pytest.mark.parametrize("pair", [("llama", "both"), ("qwen2", "attention")], ids="-".join)
def test_with_dropformer_installed_vllm_needs_no_remote_code(checkpoints, by_plugin, pair):
    folder, pruned = checkpoints[pair]
    assert_same(by_plugin[folder.name], pruned)


def test_without_either_vllm_says_what_is_missing(checkpoints, tmp_path):
    folder, _ = checkpoints["llama", "both"]
    assert "trust_remote_code=True" in in_vllm([folder], False, tmp_path)[folder.name]


def test_without_dropformer_vllm_refuses_the_default_format_rather_than_run_the_dense_model(
    default_format, by_remote_code
):
    assert isinstance(by_remote_code[default_format.name], str), "vLLM ran it"


def test_with_dropformer_vllm_runs_the_default_format(default_format, by_plugin):
    assert_same(by_plugin[default_format.name], dropformer.load(default_format))
