"""mlx-lm loads a pruned checkpoint by the folder's own model file and gives torch's log-probabilities.

`make test-mlx` builds the environment; DROPFORMER_MLX_PYTHON names the interpreter of another one.
"""

import json
import os
import shlex
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import dropformer
from dropformer.prune.engines.registry import engines

PYTHON = os.environ.get("DROPFORMER_MLX_PYTHON", "")
RUNNER = Path(__file__).parents[2] / "makers" / "mlx_run.py"
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON, reason="DROPFORMER_MLX_PYTHON does not name a Python that has mlx-lm"),
]
IDS, STEPS = [5, 6, 40, 7, 7, 19, 33, 60], 6
SPECS = ("attn=0", "attn=1,mlp=2", "attn=0,mlp=1,block=2")
WINDOWS = {"gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "head_dim": 8}}
FAMILIES = ("llama", "qwen3", "gemma3_text")
COUNTED = ("gemma3_text", SPECS[2])  # mlx-lm counts Gemma 3's windows by block number, and this drops a block


def in_mlx(folder: Path, trust: bool = True) -> dict:
    command = [PYTHON, str(RUNNER), json.dumps({"folder": str(folder), "ids": IDS, "steps": STEPS, "trust": trust})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family, spec", [pair for pair in product(FAMILIES, SPECS) if pair != COUNTED])
def test_mlx_gives_torchs_log_probabilities_and_greedy_tokens_with_and_without_a_cache(
    lively, pruned_in_memory, tmp_path, family, spec
):
    pruned = pruned_in_memory(lively(tmp_path / "dense", family, **WINDOWS.get(family, {})), spec)
    dropformer.save(pruned, tmp_path / "out")
    found = in_mlx(tmp_path / "out")
    with torch.inference_mode():
        scores = pruned(torch.tensor([IDS])).logits[0].log_softmax(-1)
        tokens = list(IDS)
        for _ in range(STEPS):
            tokens.append(int(pruned(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert torch.tensor(found["logprobs"]) == pytest.approx(scores, abs=1e-4)
    assert torch.tensor(found["cached"]) == pytest.approx(scores, abs=1e-4)
    assert found["tokens"] == tokens[len(IDS) :]
    assert sum(width > 0 for width in found["widths"]) == len(found["widths"]) - len(pruned.config.dropformer_no_cache)


def test_without_trust_mlx_says_that_the_folder_brings_code(lively, pruned_in_memory, tmp_path):
    dropformer.save(pruned_in_memory(lively(tmp_path / "dense", "llama"), "attn=1"), tmp_path / "out")
    assert "trust_remote_code" in in_mlx(tmp_path / "out", trust=False)["error"]


def test_mlx_stops_where_it_counts_windows_by_block_number_and_a_block_was_dropped(lively, pruned_in_memory, tmp_path):
    family, spec = COUNTED
    dropformer.save(pruned_in_memory(lively(tmp_path / "dense", family, **WINDOWS[family]), spec), tmp_path / "out")
    assert "by block number" in in_mlx(tmp_path / "out")["error"]


def test_mlx_lms_own_command_generates_text_where_there_is_no_torch(lively, pruned_in_memory, tmp_path):
    """It reads the tokenizer by AutoTokenizer, which runs the checkpoint's config code first."""
    dropformer.save(pruned_in_memory(lively(tmp_path / "dense", "llama"), "attn=1"), tmp_path / "out")
    words = Tokenizer(models.WordLevel({chr(97 + i % 26) + str(i // 26): i for i in range(64)}, unk_token="a0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b0").save_pretrained(tmp_path / "out")
    command = engines(tmp_path / "out")["engines"]["mlx"]["command"]
    program, *rest = shlex.split(command)
    done = subprocess.run(
        [Path(PYTHON).with_name(program), *rest, "--max-tokens", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Generation: 3 tokens" in done.stdout
