"""A new folder appears complete or not at all, however the run that writes it ends."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dropformer.prune.errors import OutputError
from dropformer.prune.files import new_folder, open_checkpoint
from dropformer.prune.files.folder import new_file

DEAD_PID = 2**22 + 1  # above the kernel's highest process id


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_into(out: Path) -> None:
    with new_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("content")


def test_the_folder_appears_with_all_that_was_written(tmp_path: Path) -> None:
    with new_folder(tmp_path / "runs" / "out") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "runs" / "out").exists()
    assert (tmp_path / "runs" / "out" / "file").read_text() == "content"
    assert listing(tmp_path / "runs") == ["out"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "runs" / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_empty_folder_is_replaced_and_a_link_to_one_followed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write_into(tmp_path / "link")
    assert listing(tmp_path) == ["empty", "link"] and listing(tmp_path / "empty") == ["sub"]


def test_what_exists_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("full", "file", "full/mine/out", "loop", "loop/out"):
        with pytest.raises(OutputError) as caught:
            write_into(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert listing(tmp_path) == ["file", "full", "loop"] and listing(tmp_path / "full") == ["mine"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="appeared meanwhile"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")
    assert listing(tmp_path) == ["out"] and listing(tmp_path / "out") == ["theirs"]


def test_a_mount_point_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a mount point"):
        write_into(Path("/proc"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, OSError])
def test_whatever_is_raised_passes_through_and_nothing_is_left(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("content")
        raise error
    assert listing(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line() -> None:
    with pytest.raises(OutputError, match="choose another"):
        write_into(Path("/proc/self/out"))


def test_left_overs_of_dead_runs_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    names = [f".dropformer-{DEAD_PID}-0123abcd", f".dropformer-{os.getpid()}-0123abcd", ".dropformer-x", "mine"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / f".dropformer-{DEAD_PID}-11112222").symlink_to(tmp_path / "mine")
    with new_folder(tmp_path / "one") as theirs:
        write_into(tmp_path / "two")
        assert theirs.is_dir()
    assert listing(tmp_path) == sorted([*names[1:], f".dropformer-{DEAD_PID}-11112222", "one", "two"])
    assert listing(tmp_path / "mine") == ["file"]


def test_a_locked_folder_is_not_taken_for_a_left_over(tmp_path: Path) -> None:
    with new_folder(tmp_path / "one") as folder:
        strange = folder.rename(tmp_path / f".dropformer-{DEAD_PID}-0123abcd")  # a live run in another container
        write_into(tmp_path / "two")
        assert strange.is_dir()
        strange.rename(folder)
    assert listing(tmp_path) == ["one", "two"]


WRITE_FOREVER = """
import itertools, sys
from pathlib import Path
from dropformer.prune.files import copy_checkpoint, new_folder, open_checkpoint
source, target = map(Path, sys.argv[1:])
print("ready", flush=True)
for number in itertools.count():
    with new_folder(target / str(number)) as folder:
        (folder / "config.json").write_text("{}")
        copy_checkpoint(open_checkpoint(source), folder, lambda name: name)
"""


def test_a_run_killed_at_any_moment_leaves_complete_folders_only(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text("{}")
    draw = np.random.default_rng(0)
    save_file({f"t{i}": draw.random(50_000) for i in range(4)}, source / "model.safetensors")
    fingerprint, content = open_checkpoint(source).fingerprint, (source / "model.safetensors").read_bytes()
    killed_within = 0
    for seed in range(12):
        command = [sys.executable, "-c", WRITE_FOREVER, str(source), str(target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
            assert run.stdout and run.stdout.readline() == b"ready\n"
            time.sleep(random.Random(seed).uniform(0.0, 0.08))
            run.kill()
        killed_within += any(name.startswith(".") for name in listing(target))
        for folder in target.iterdir():
            if folder.name.startswith("."):
                continue
            assert open_checkpoint(folder).fingerprint == fingerprint
            assert (folder / "model.safetensors").read_bytes() == content
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    assert killed_within
    write_into(target / "last")
    assert listing(target) == ["last"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_file(tmp_path / "runs" / "out.bin") as path:
        path.write_text("content")
        assert not (tmp_path / "runs" / "out.bin").exists()
    assert (tmp_path / "runs" / "out.bin").read_text() == "content" and listing(tmp_path / "runs") == ["out.bin"]
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "runs" / "other.bin") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert listing(tmp_path / "runs") == ["out.bin"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="appeared meanwhile"), new_file(tmp_path / "out") as path:
        path.write_text("mine")
        (tmp_path / "out").write_text("theirs")
    assert listing(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "theirs"
