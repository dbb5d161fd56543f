"""An export that is killed leaves no half-written checkpoint, and its one temporary folder goes with the next run."""

import os
import random
import signal
import time

import pytest

from dropformer import api
from dropformer.prune.files.folder import TEMPORARY
from dropformer.prune.formats.export import reference
from dropformer.prune.loading.load import load


def export_and_kill(pruned, out, delay: float) -> None:
    """Save in a child process, which is killed after `delay` seconds if it is still at it."""
    child = os.fork()
    if not child:
        try:
            api.save(pruned, out)
        finally:
            os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def kill_often(folder, tmp_path, times: int) -> None:
    dense = api.LoadedModel(load(folder), None, folder, reference("tiny", folder), None)
    pruned = api.drop(dense, api.plan_unscored(dense.ref, api.outline(dense.model), "attn=1", (), None))
    start = time.monotonic()
    api.save(pruned, tmp_path / "whole" / "out")
    whole, draw = time.monotonic() - start, random.Random(0)
    for number in range(times):
        out = tmp_path / "killed" / f"out{number}"
        out.parent.mkdir(exist_ok=True)
        export_and_kill(pruned, out, draw.uniform(0, 1.2 * whole))
        assert len(list(out.parent.glob(f"{TEMPORARY}*"))) <= 1
        if out.exists():
            load(out)
    api.save(pruned, tmp_path / "killed" / "last")
    assert not list((tmp_path / "killed").glob(f"{TEMPORARY}*"))


def test_a_killed_export_of_a_drop_is_whole_or_absent(llama_folder, tmp_path):
    kill_often(llama_folder, tmp_path, 6)


@pytest.mark.slow
def test_a_hundred_kills_leave_nothing_half_written(llama_folder, tmp_path):
    kill_often(llama_folder, tmp_path, 100)
