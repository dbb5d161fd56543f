"""The GPU benchmark runs from end to end on a CPU, so that it works where a GPU is at hand for minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_step_runs_on_a_cpu_with_small_models(tmp_path):
    command = [sys.executable, str(GPU), "--rehearse", "--until", "3000", "--lines", str(tmp_path / "gpu.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *steps, last = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert done.returncode == 0, done.stdout
    assert [line["step"] for line in steps][:4] == ["tests", "prune", "analyze", "best"] and len(steps) == 11
    assert last["wrong"] == [] and last["device"] == "cpu, a rehearsal"


def test_without_a_device_one_line_says_what_to_do(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    done = subprocess.run([sys.executable, str(GPU), "--folder", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().startswith("no CUDA device is here; `--rehearse`")
    assert "Traceback" not in done.stderr
