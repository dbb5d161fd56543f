"""vLLM, with dropformer installed beside it, runs the default format as torch does, and drafts with it.

`make test-vllm` builds the environment; DROPFORMER_VLLM_PYTHON names the interpreter of another one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dropformer

ROOT = Path(__file__).parents[3]
PYTHON = os.environ.get("DROPFORMER_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="DROPFORMER_VLLM_PYTHON does not name a Python that has vLLM"),
]
PROMPTS = [list(range(5, 17)), [40, 7, 7, 19], [63, 3], [20, 21, 22, 23, 24, 25]]
STEPS, DRAFTED = 32, 4

RUN = """
import json, sys
from vllm import LLM, SamplingParams

work = json.loads(sys.argv[1])
llm = LLM(work["model"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128, seed=0,
          disable_log_stats=False, distributed_executor_backend="uni", **work["more"])
ask = SamplingParams(temperature=0, max_tokens=work["steps"], detokenize=False, ignore_eos=True)
outs = llm.generate([{"prompt_token_ids": ids} for ids in work["prompts"]], ask, use_tqdm=False)
counts = {m.name.removeprefix("vllm:spec_decode_num_"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
print("\\nFOUND" + json.dumps({"tokens": [list(out.outputs[0].token_ids) for out in outs], "counts": counts}))
"""


def found_right(families: str, *more: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/engines.py"), "--vllm", PYTHON, *more, *families.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["right"] == len(families.split()), done.stdout


@pytest.mark.parametrize("families", ["llama qwen3 gemma3_text", "mixtral phi3 olmo2 gpt2"])
def test_vllm_gives_torchs_log_probabilities_and_tokens_and_caches_kept_layers_alone(families):
    found_right(families)


def test_windows_without_sinks_are_vllms_sliding_windows():
    found_right("llama", "--drop", "attn=3,window=0,1@5")


def test_two_tensor_parallel_ranks_give_the_same():
    found_right("qwen3", "--ranks", "2")


def in_vllm(tmp_path: Path, model: Path, **more) -> dict:
    work = {"model": str(model), "prompts": PROMPTS, "steps": STEPS, "more": more}
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"PYTHONPATH": str(site(tmp_path))}
    done = subprocess.run(
        [PYTHON, "-c", RUN, json.dumps(work)], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert "\nFOUND" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("\nFOUND")[2])


def site(tmp_path: Path) -> Path:
    """A folder in which dropformer is installed for vLLM: its code, and its entry points."""
    root = tmp_path / "site"
    if not root.exists():
        info = root / "dropformer-0.dist-info"
        info.mkdir(parents=True)
        (root / "dropformer").symlink_to(ROOT)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dropformer\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\ndropformer = dropformer.prune.engines.vllm_plugin:register\n"
        )
    return root


def agreed(draft, prompt: list[int], written: list[int]) -> list[bool]:
    """Is each token but the first what the draft writes greedily behind those before it?"""
    with torch.inference_mode():
        best = draft(torch.tensor([prompt + written])).logits[0].argmax(-1).tolist()
    return [best[len(prompt) + i - 1] == token for i, token in enumerate(written)][1:]


def counted(agrees: list[bool]) -> tuple[int, int]:
    """Rounds and accepted tokens.  The first token is the prompt's pass's; each round adds one of the dense model's."""
    rounds = accepted = place = 0
    while place < len(agrees):
        some = agrees[place : place + DRAFTED]
        right = some.index(False) if False in some else len(some)
        rounds, accepted, place = rounds + 1, accepted + right, place + right + 1
    return rounds, accepted


def test_rounds_of_the_reference():
    assert counted([True, False, True, True, True, True, False]) == (2, 5)


def test_vllm_gives_the_dense_text_and_accepts_what_the_draft_writes_in_torch(lively, pruned_in_memory, tmp_path):
    dense = lively(tmp_path / "dense", "llama", hidden_size=128, intermediate_size=256, max_position_embeddings=256)
    pruned = pruned_in_memory(dense, "attn=1,3")
    dropformer.save(pruned, tmp_path / "draft")
    drafting = {"method": "draft_model", "model": str(tmp_path / "draft"), "num_speculative_tokens": DRAFTED}

    alone = in_vllm(tmp_path, dense)
    beside = in_vllm(tmp_path, dense, speculative_config=drafting)

    assert beside["tokens"] == alone["tokens"]
    found = [counted(agreed(pruned, *each)) for each in zip(PROMPTS, alone["tokens"], strict=True)]
    rounds, accepted = (sum(column) for column in zip(*found, strict=True))
    assert 0 < accepted < DRAFTED * rounds
    # Rounds that pass the last token count there, so each prompt may differ by one round and what it accepts.
    assert beside["counts"]["drafts"] == pytest.approx(rounds, abs=len(PROMPTS))
    assert beside["counts"]["accepted_tokens"] == pytest.approx(accepted, abs=DRAFTED)
