"""Python processes without dropformer, forked from one that has imported torch and transformers, which takes seconds.

with Elsewhere() as run:
    done = run(code, *arguments, env={"HF_HUB_OFFLINE": "1"})      # as subprocess.run([python, "-c", code, ...])
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PARENT = """
import json, os, sys, traceback
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import hub
import transformers.dynamic_module_utils as remote_code

def child(job, env, out):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{out}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(job["cwd"])
    for module in (hub, transformers.utils, remote_code):
        module.HF_MODULES_CACHE = f"{out}/modules"
    sys.argv = ["-c", *job["arguments"]]
    try:
        exec(compile(job["code"], "<elsewhere>", "exec"), {"__name__": "__main__"})
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1

print("ready", flush=True)
for line in sys.stdin:
    job, children = json.loads(line), []
    for env, out in zip(job["envs"], job["outs"]):
        if (pid := os.fork()) == 0:
            status = child(job, env, out)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)
"""


class Elsewhere:
    """Runs code in a fresh fork of the parent process, which starts with the first one."""

    def __init__(self) -> None:
        self._parent: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, *_: object) -> None:
        if self._parent and self._parent.stdin:
            self._parent.stdin.close()
            self._parent.wait(60)

    def __call__(self, code: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """One process; `env` is added to this process's environment."""
        return self.together(code, *arguments, envs=[options.pop("env", {})], **options)[0]

    def launched(self, code: str, *arguments: Any, processes: int, port: int) -> list[subprocess.CompletedProcess[str]]:
        """Processes that meet as those of one `torchrun`."""
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return self.together(
            code, *arguments, envs=[{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
        )

    def together(
        self, code: str, *arguments: Any, envs: Sequence[Mapping[str, str]], cwd: Path | str = "."
    ) -> list[subprocess.CompletedProcess[str]]:
        """One process for each environment, at the same time."""
        with tempfile.TemporaryDirectory(prefix="elsewhere-") as scratch:
            outs = [Path(scratch, str(i)) for i in range(len(envs))]
            for out in outs:
                out.mkdir()
            job = {"code": code, "arguments": list(map(str, arguments)), "cwd": str(Path(cwd).resolve())}
            job |= {"outs": list(map(str, outs)), "envs": [{**os.environ, **env} for env in envs]}
            statuses = json.loads(self._ask(json.dumps(job)))
            return [
                subprocess.CompletedProcess(code, status, *((out / name).read_text() for name in ("stdout", "stderr")))
                for status, out in zip(statuses, outs, strict=True)
            ]

    def _ask(self, line: str) -> str:
        if self._parent is None:
            self._parent = subprocess.Popen(
                [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert self._parent.stdout and self._parent.stdout.readline() == "ready\n"
        assert self._parent.stdin and self._parent.stdout
        print(line, file=self._parent.stdin, flush=True)
        return self._parent.stdout.readline()
