"""The Hub's client against a server on this machine that speaks as much of the Hub as is needed."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"model_type": "llama"}'
MODELS = {
    "org/good": {
        "config.json": CONFIG,
        "model.safetensors": b"weights",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"",
        "pytorch_model.bin": b"a pickle",
        "consolidated.safetensors": b"weights again",
        "original/params.json": b"{}",
        "original/consolidated.00.pth": b"weights once more",
        "additional_chat_templates/tools.jinja": b"",
        "1_Pooling/config.json": b"{}",
        "source.spm": b"",
        "README.md": b"",
    },
    "org/pickled": {"config.json": CONFIG, "pytorch_model.bin": b"a pickle"},
    "org/empty": {"README.md": b""},
    "mistralai/Mistral-7B-v0.1": {"config.json": CONFIG, "model.safetensors": b"weights"},
}
CLIENT = """
import json, sys
from dropformer.recipes import open_config, open_source
for how, name in json.loads(sys.argv[1]):
    told = []
    try:
        found = open_config(name) if how == "config" else open_source(name, progress=told.append)
        files = sorted(path.relative_to(found.path).as_posix() for path in found.path.rglob("*") if path.is_file())
        recipe = found.recipe.name if found.recipe else None
        about = {"files": files, "revision": found.revision, "recipe": recipe, "name": str(found), "told": told}
        print(json.dumps(about))
    except Exception as error:
        print(json.dumps({"kind": type(error).__name__, "error": str(error)}))
"""


class Hub(BaseHTTPRequestHandler):
    """GET /api/models/ID[/revision/REV], /api/models/ID/tree/REV and GET or HEAD /ID/resolve/REV/FILE."""

    def do_GET(self) -> None:
        self.server.asked.append(unquote(urlsplit(self.path).path))
        parts = self.server.asked[-1].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.api("/".join(parts[2:4]), parts[4:])
        else:
            self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    do_HEAD = do_GET

    def api(self, model: str, rest: list[str]) -> None:
        if not self.known(model, rest[1] if rest else "main"):
            return
        files = MODELS[model]
        content: object = {"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        if rest[:1] == ["tree"]:
            content = [{"type": "file", "oid": "a" * 40, "size": len(files[name]), "path": name} for name in files]
        self.answer(200, json.dumps(content).encode())

    def file(self, model: str, revision: str, name: str) -> None:
        if not self.known(model, revision):
            return
        if name in MODELS[model]:
            self.answer(200, MODELS[model][name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def known(self, model: str, revision: str) -> bool:
        error = None
        if model == "org/gated":
            error = (403, "GatedRepo")
        elif model == "org/broken":
            error = (500, "Oops")
        elif model not in MODELS:
            error = (401, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            error = (404, "RevisionNotFound")
        if error:
            self.answer(error[0], b"{}", {"X-Error-Code": error[1]})
        return error is None

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
def hub(tmp_path):
    """`ask(*calls, **environment)` runs the client in a process of its own and returns what it printed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    base |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }

    def ask(*calls, **environment):
        command = [sys.executable, "-c", CLIENT, json.dumps(calls)]
        run = subprocess.run(
            command, env={**base, **environment}, capture_output=True, text=True, check=True, cwd=tmp_path
        )
        return [json.loads(line) for line in run.stdout.splitlines()]

    yield SimpleNamespace(ask=ask, asked=server.asked)
    server.shutdown()
    server.server_close()


def test_a_hub_model_is_fetched_without_pickles_duplicates_and_other_formats(hub):
    (found,) = hub.ask(["source", "org/good@v1"])
    files = ["1_Pooling/config.json", "README.md", "additional_chat_templates/tools.jinja", "chat_template.jinja"]
    files += ["config.json", "model.safetensors", "source.spm", "tokenizer.json"]
    assert found["files"] == files
    assert "pytorch_model.bin" in found["told"][-1]
    assert found["revision"] == COMMIT and found["name"] == f"org/good@{COMMIT}"
    assert not [
        path for path in hub.asked if path.endswith((".bin", ".pth", "params.json", "consolidated.safetensors"))
    ]


def test_only_the_config_is_fetched_for_an_estimate(hub):
    (found,) = hub.ask(["config", "org/good"])
    assert (found["files"], found["revision"]) == (["config.json"], COMMIT)


def test_a_recipe_leads_to_its_hub_model_and_a_hub_model_to_its_recipe(hub):
    by_recipe, by_id, config = hub.ask(
        ["source", "mistral-7b"], ["source", "mistralai/Mistral-7B-v0.1"], ["config", "mistral-7b"]
    )
    assert by_recipe["recipe"] == by_id["recipe"] == config["recipe"] == "mistral-7b"
    assert by_recipe["files"] == by_id["files"] == ["config.json", "model.safetensors"]
    assert by_recipe["name"] == f"mistral-7b@{COMMIT}"


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub):
    expected = {
        "org/gated": "is gated: accept its licence",
        "org/absent": "is not on the Hub, or private; check the spelling",
        "org/good@v9": "has no revision v9",
        "org/pickled": "only as pickles (pytorch_model.bin)",
        "org/empty": "no *.safetensors",
        "org/broken": "the Hub refused org/broken",
    }
    answers = hub.ask(*[["source", name] for name in expected])
    for answer, words in zip(answers, expected.values(), strict=True):
        assert answer["kind"] in ("ModelError", "CheckpointError")
        assert words in answer["error"] and "\n" not in answer["error"]
    for answer, words in zip(
        hub.ask(["config", "org/gated"], ["config", "org/absent"], ["config", "org/empty"]),
        ("is gated", "not on the Hub", "no config.json on the Hub"),
        strict=True,
    ):
        assert words in answer["error"]


def test_without_network_a_model_fetched_before_still_opens_and_no_other(hub):
    hub.ask(["source", "org/good"], ["config", "mistral-7b"])
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for environment, words in ((nowhere, "cannot be reached"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        good, half, config, other = hub.ask(
            ["source", "org/good"], ["source", "mistral-7b"], ["config", "mistral-7b"], ["config", "org/pickled"],
            **environment,
        )  # fmt: skip
        assert good["revision"] == COMMIT and "model.safetensors" in good["files"]
        assert words in half["error"] and words in other["error"]
        assert config["files"] == ["config.json"]


def test_offline_the_hub_is_not_even_asked(hub):
    hub.ask(["source", "org/good"], HF_HUB_OFFLINE="1")
    assert hub.asked == []
