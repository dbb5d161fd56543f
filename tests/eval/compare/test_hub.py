"""Revisions of a Hub model, from a server on this machine: fetched, scored and removed one after another."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import torch

COMMITS = {"step1": "1" * 40, "step20": "2" * 40, "pickled": "3" * 40}
CLIENT = """
import json, shutil, sys
from pathlib import Path
from dropformer.eval.compare.compare import CompareRequest, compare
from dropformer.metrics.calibration.settings import Calibration
from dropformer.prune.errors import DropformerError
from dropformer.prune.files.output_paths import cache_folder
from dropformer.progress import Progress, Silent

def weights():
    return sorted(path.parent.name[0] for path in Path(sys.argv[1]).rglob("model.safetensors"))

class Spy(Silent):
    def __init__(self):
        self.seen = []
    def stage(self, name, total=None):
        self.seen.append(weights())
        return super().stage(name, total)

def run(revisions, **fields):
    spy, text = Spy(), Calibration("words.txt", samples=2, length=16)
    try:
        found = compare(CompareRequest(["org/model"], "attn:1", revisions=revisions, calibration=text, **fields), spy)
    except DropformerError as error:
        return {"error": str(error), "seen": spy.seen}
    rows = [[c.label, c.step, c.model.name, c.model.revision] for c in found.checkpoints]
    return {"rows": rows, "seen": spy.seen, "left": weights()}

out = [run(["step20", "step1"]), run(["step20", "step1"]), run(["step1", "pickled"])]
shutil.rmtree(cache_folder() / "scores")
out += [run(["step1", "step20"], keep_downloads=True), run(["step1", "step20"])]
print(json.dumps(out))
"""


class Hub(BaseHTTPRequestHandler):
    """GET /api/models/ID/revision/REV, /api/models/ID/tree/REV and GET or HEAD /ID/resolve/REV/FILE."""

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.api(parts[4], parts[5])
            return
        revision, name = self.named(parts[3]), "/".join(parts[4:])
        path = self.server.folder / revision / name
        self.server.asked.append((revision, name, self.command))
        if path.is_file():
            headers = {"ETag": f'"{revision}{name}"', "X-Repo-Commit": COMMITS[revision]}
            self.answer(200, path.read_bytes(), headers)
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def api(self, what: str, revision: str) -> None:
        revision = self.named(revision)
        files = sorted((self.server.folder / revision).iterdir())
        content: object = {
            "id": "org/model", "sha": COMMITS[revision], "siblings": [{"rfilename": path.name} for path in files]
        }  # fmt: skip
        if what == "tree":
            content = [
                {"type": "file", "oid": "a" * 40, "size": path.stat().st_size, "path": path.name} for path in files
            ]
        self.answer(200, json.dumps(content).encode())

    def named(self, revision: str) -> str:
        return next((name for name, commit in COMMITS.items() if commit == revision), revision)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """The test's output is not the place."""


@pytest.fixture
def server(tmp_path: Path, tiny: SimpleNamespace):
    folder = tmp_path / "server"
    for revision, moved in (("step1", 0.0), ("step20", 0.1)):
        model = tiny.llama()
        with torch.no_grad():
            model.lm_head.weight.add_(moved)
        model.save_pretrained(folder / revision)
        tiny.tokenizer().save_pretrained(folder / revision)
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text("{}")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"a pickle")
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made.folder, made.asked = folder, []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


def test_revisions_are_fetched_scored_and_removed_one_at_a_time(server, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("the heart and the nerve moves a star under light " * 30, encoding="utf-8")
    hub = tmp_path / "hf"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(hub),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "DROPFORMER_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", CLIENT, str(hub)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    first, again, refused, kept, present = json.loads(run.stdout.splitlines()[-1])
    rows = [["step1", 1, "org/model", COMMITS["step1"]], ["step20", 20, "org/model", COMMITS["step20"]]]
    assert first == {"rows": rows, "seen": [["1"], ["2"]], "left": []}
    assert again == {"rows": rows, "seen": [], "left": []}
    assert "org/model has its weights only as pickles" in refused["error"] and refused["seen"] == []
    assert kept == {"rows": rows, "seen": [["1"], ["1", "2"]], "left": ["1", "2"]}
    assert present["left"] == ["1", "2"]  # what was here before stays
    downloads = [name for name in server.asked if name[1:] == ("model.safetensors", "GET")]
    assert len(downloads) == 4  # two for the first run, none for the second, two to keep
