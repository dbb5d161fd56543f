import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dropformer.eval.compare.checkpoints import find_checkpoints, step_of
from dropformer.prune.errors import CheckpointError, ModelError


def write(folder: Path, value: float = 0.0, weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if weights.endswith(".safetensors"):
        save_file({"a": np.full((4, 4), value, np.float32)}, folder / weights)
    else:
        (folder / weights).write_bytes(b"pickle")
    return folder


def found(*names: object, revisions: tuple[str, ...] = ()) -> list[tuple[str, int | None]]:
    return [(c.label, c.step) for c in find_checkpoints([str(name) for name in names], revisions)]


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("checkpoint-500", 500), ("step143000", 143000), ("stage1-step10000-tokens21B", 10000),
        ("iter_0002384", 2384), ("global_step1000", 1000), ("ckpt_007", 7), ("step-125000", 125000),
        ("TinyLlama-1.1B-intermediate-step-1431k-3T", 1431000), ("main", None), ("llama-2-7b", None),
        ("footstep9", None), ("stage2-ingredient3-step23852-tokens51B", None),
    ],
)  # fmt: skip
def test_the_step_is_read_from_names_as_training_suites_write_them(text: str, step: int | None) -> None:
    assert step_of(text) == step


def test_a_folder_of_a_training_run_gives_its_checkpoints_by_number(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        write(tmp_path / "run" / f"checkpoint-{step}", step)
    (tmp_path / "run" / "runs").mkdir()
    (tmp_path / "run" / "tmp-checkpoint-200").mkdir()
    assert found(tmp_path / "run") == [("checkpoint-9", 9), ("checkpoint-10", 10), ("checkpoint-100", 100)]


def test_the_final_model_counts_unless_it_is_the_last_checkpoint_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        write(run / f"checkpoint-{step}", step)
    write(run, 2)
    assert found(run) == [("checkpoint-1", 1), ("checkpoint-2", 2)]
    write(run, 3)
    assert found(run)[-1] == ("run", None)
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    assert found(run)[-1] == ("run", 3)
    (run / "trainer_state.json").write_text("[]")
    assert found(run)[-1] == ("run", None)


def test_folders_named_one_by_one_are_put_in_the_order_of_training(tmp_path: Path) -> None:
    names = [write(tmp_path / name, i) for i, name in enumerate(("checkpoint-10", "final", "checkpoint-9"))]
    assert found(*names) == [("checkpoint-9", 9), ("checkpoint-10", 10), ("final", None)]


def test_labels_are_the_shortest_names_that_differ(tmp_path: Path) -> None:
    one, two = (write(tmp_path / run / "checkpoint-1") for run in ("one", "two"))
    assert [label for label, _ in found(one, two)] == ["one/checkpoint-1", "two/checkpoint-1"]
    assert [label for label, _ in found(one, one)] == [f"{one} #1", f"{one} #2"]


def test_revisions_are_of_one_hub_model(tmp_path: Path) -> None:
    assert found("org/model", revisions=("main", "step10", "step2")) == [("step2", 2), ("step10", 10), ("main", None)]
    assert found("org/model@step1", "org/model@step2") == [("step1", 1), ("step2", 2)]
    for names in (("org/a", "org/b"), ("org/a@main",), (str(write(tmp_path / "here")),)):
        with pytest.raises(ModelError, match="--revisions needs one Hub model"):
            found(*names, revisions=("step1", "step2"))


def test_a_recipe_stands_for_the_revisions_that_it_names() -> None:
    assert found("pythia-160m")[-1] == ("step143000", 143000)
    steps = [step for _, step in found("olmo-2-1b")]
    assert steps == sorted(steps) and steps[0] == 0
    assert found("pythia-160m", revisions=("step1", "step2")) == [("step1", 1), ("step2", 2)]


def test_a_recipe_without_revisions_says_why() -> None:
    with pytest.raises(ModelError, match=r"map-neo-7b: its checkpoints are not revisions; .* raw Megatron shards"):
        found("map-neo-7b")


def test_a_checkpoint_of_pickles_is_refused_before_anything_runs(tmp_path: Path) -> None:
    write(tmp_path / "run" / "checkpoint-1")
    write(tmp_path / "run" / "checkpoint-2", weights="pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only as pickles"):
        found(tmp_path / "run")


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match="/nowhere does not exist"):
        found("/nowhere", "org/model")
