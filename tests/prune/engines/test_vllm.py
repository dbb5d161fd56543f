"""vLLM, with dropformer installed beside it, runs the default format as torch does.

`make test-vllm` builds the environment; DROPFORMER_VLLM_PYTHON names the interpreter of another one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PYTHON = os.environ.get("DROPFORMER_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="DROPFORMER_VLLM_PYTHON does not name a Python that has vLLM"),
]


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
