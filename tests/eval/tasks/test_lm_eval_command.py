"""lm-eval's own command evaluates an exported checkpoint, on a machine that has no dropformer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dropformer import api
from dropformer.eval.tasks.results import TaskOptions
from dropformer.eval.tasks.tasks import evaluate_tasks

WITHOUT_DROPFORMER = """
import sys
sys.modules["dropformer"] = None  # importing it fails, as where it is not installed
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture
def questions(tiny, tmp_path) -> Path:
    """A folder with a task file and its questions."""
    rows = [
        {"q": f"the {a} is", "c": [" light", " bone", " law"], "a": i % 3}
        for i, a in enumerate(["heart", "star", "court"] * 4)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "local.yaml").write_text(json.dumps(task))  # JSON is YAML
    return tmp_path


@pytest.mark.slow
def test_lm_evals_command_loads_an_export_without_dropformer(tiny, tokenizer, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    tiny.llama().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    opened = api.open_model(tmp_path / "dense")
    pruned = api.drop(opened, api.plan_unscored(opened.ref, api.outline(opened.model), "attn=0,2", (), None))
    api.save(pruned, tmp_path / "pruned")
    command = [sys.executable, "-c", WITHOUT_DROPFORMER, "--model", "hf", "--tasks", "local_questions"]
    command += ["--model_args", f"pretrained={tmp_path / 'pruned'},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", str(questions), "--device", "cpu", "--output_path", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "results").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]["local_questions"]["acc,none"]
    ours = evaluate_tasks(pruned, tokenizer, ["local_questions"], TaskOptions(include=questions))
    assert theirs == pytest.approx(ours.tasks["local_questions"].value)
