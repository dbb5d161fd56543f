"""Publishing against a server on this machine that speaks as much of the Hub as an upload needs."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dropformer.prune.errors import ModelError, OutputError
from dropformer.recipes.push import push

RECORD = {"spec": "attn:1", "model": {"name": "tiny"}}


class Hub(BaseHTTPRequestHandler):
    """Takes what is uploaded by a token named `good`, and keeps it in `server.files`."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer good":
            return self.answer(403, {"error": "Forbidden"})
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": f"http://{self.headers['Host']}/me/small", "id": "me/small"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer(200, {"files": [{"path": name, **how} for name in names]})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.title = lines[0]["value"]["summary"]
            for line in lines[1:]:
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                200, {"commitUrl": f"http://{self.headers['Host']}/me/small/commit/1", "commitOid": "1" * 40}
            )
        return self.answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.answer(404, {"error": "not found"})

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """The test's output is not the place."""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.files, server.title = [], {}, ""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    files = {"dropformer.json": json.dumps(RECORD), "README.md": "card", "model.safetensors": "weights"}
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def run(tmp_path, *arguments, **environment):
    base = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    base |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "dropformer", "push", *map(str, arguments)]
    return subprocess.run(command, env={**base, **environment}, capture_output=True, text=True, cwd=tmp_path)


def test_the_checkpoint_and_its_card_arrive_at_the_hub(hub, checkpoint, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    done = run(tmp_path, checkpoint, "me/small", HF_ENDPOINT=endpoint, HF_TOKEN="good")
    assert done.returncode == 0, done.stderr
    assert hub.files == {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert hub.title == "tiny, pruned (attn:1)"
    assert "me/small" in done.stdout


def test_a_token_that_may_not_write_is_told_so_in_one_line(hub, checkpoint, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    for token in ({}, {"HF_TOKEN": "bad"}):
        done = run(tmp_path, checkpoint, "me/small", "-q", HF_ENDPOINT=endpoint, **token)
        assert done.returncode == 2
        assert done.stderr.startswith("prune: ") and done.stderr.count("\n") == 1
        assert "hf auth login" in done.stderr
    assert hub.files == {}


def test_without_network_nothing_is_pushed_and_one_line_says_so(checkpoint, tmp_path):
    done = run(tmp_path, checkpoint, "me/small", "-q", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="good")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot be reached" in done.stderr


def test_only_a_checkpoint_of_ours_and_a_good_name_are_taken(checkpoint, tmp_path):
    with pytest.raises(ModelError, match=r"no dropformer\.json"):
        push(tmp_path, "me/small")
    with pytest.raises(OutputError, match="expected user/name"):
        push(checkpoint, "small")
