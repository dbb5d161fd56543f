"""Run GGUF files in llama.cpp from a test: the interpreter is DROPFORMER_LLAMACPP_PYTHON's."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

PYTHON = os.environ.get("DROPFORMER_LLAMACPP_PYTHON")
RUNNER = Path(__file__).parent / "llamacpp_logits.py"
IDS = [1, 40, 7, 200, 99, 31, 5, 250, 260, 77, 140, 18]
NEEDS_LLAMACPP = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON, reason="DROPFORMER_LLAMACPP_PYTHON names no interpreter that has cyllama 0.2.18"),
]


def llamacpp(tmp_path, *files):
    """Logits of IDS, [files, 2, T, V]: in float32 throughout, and with flash attention."""
    out = tmp_path / "logits.npy"
    run = subprocess.run([PYTHON, RUNNER, out, json.dumps(IDS), *files], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return np.load(out)


def error(got, want):
    """The largest difference relative to the largest logit."""
    return np.abs(got - want).max() / np.abs(want).max()
