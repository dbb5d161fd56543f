import multiprocessing
import time
from pathlib import Path

import pytest

from dropformer.prune.errors import ModelError, OutputError
from dropformer.prune.files.output_paths import cache_folder
from dropformer.recipes.cache import building, place


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("DROPFORMER_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("DROPFORMER_CACHE")
    assert cache_folder().name == "dropformer"


def test_what_is_placed_is_whole_and_the_scratch_is_gone(tmp_path):
    target = tmp_path / "deep" / "model"
    with building(target) as scratch:
        (scratch / "folder").mkdir()
        (scratch / "folder" / "a").write_text("1")
        (scratch / "rubbish").write_text("2")
        place(scratch / "folder", target)
    assert [path.name for path in target.iterdir()] == ["a"]
    assert not list(target.parent.glob("*.tmp-*")) and not list(target.parent.glob(".*.tmp-*"))


def test_a_failed_build_leaves_no_target(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(ModelError), building(target) as scratch:
        (scratch / "half").write_text("1")
        raise ModelError("no")
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    stale = tmp_path / ".model.tmp-abc"
    stale.mkdir()
    (stale / "half").write_text("1")
    with building(tmp_path / "model"):
        assert not stale.exists()


def test_an_unwritable_cache_is_one_line_that_names_the_variable(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="DROPFORMER_CACHE"), building(tmp_path / "file" / "model"):
        pass


def _build_slowly(target: Path, log: Path) -> None:
    with building(target) as scratch:
        if not target.exists():
            time.sleep(0.2)
            (scratch / "file").write_text("whole")
            place(scratch / "file", target)
            with log.open("a") as file:
                file.write("built\n")


def test_of_concurrent_runs_one_builds_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "model", tmp_path / "log")
    runs = [context.Process(target=_build_slowly, args=arguments) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert (tmp_path / "log").read_text() == "built\n"
    assert (tmp_path / "model").read_text() == "whole"


def test_waiting_for_another_run_is_told(tmp_path):
    told: list[str] = []
    context = multiprocessing.get_context("fork")
    other = context.Process(target=_build_slowly, args=(tmp_path / "model", tmp_path / "log"))
    other.start()
    while not (tmp_path / ".model.lock").exists() or not list(tmp_path.glob(".model.tmp-*")):
        time.sleep(0.01)
    with building(tmp_path / "model", told.append):
        assert (tmp_path / "model").exists()
    other.join()
    assert told == ["waiting for another run that is making model"]
