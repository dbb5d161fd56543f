"""Opening a checkpoint folder ends in a complete, consistent list of byte ranges, or in one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dropformer.prune.errors import CheckpointError
from dropformer.prune.files import open_checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def tensors(first: int, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed + first)
    return {f"layers.{i}.weight": draw.random((4, i + 1), dtype=np.float32) for i in range(first, first + count)}


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def single(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors(0, 4, seed), folder / "model.safetensors", {"format": "pt"})
    return folder


def sharded(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    held = {SHARDS[0]: tensors(0, 2, seed), SHARDS[1]: tensors(2, 2, seed)}
    for name, content in held.items():
        save_file(content, folder / name, {"format": "pt", "shard": name})
    write_index(folder, {name: shard for shard, content in held.items() for name in content})
    return folder


def refusal(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    return message


@pytest.mark.parametrize("make", [single, sharded])
def test_every_tensor_is_read_back_from_its_range(make, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path))
    expected = {**tensors(0, 2), **tensors(2, 2)} if make is sharded else tensors(0, 4)
    assert {name: checkpoint.read(name) for name in checkpoint.tensors} == {
        name: value.tobytes() for name, value in expected.items()
    }
    assert checkpoint.nbytes == sum(value.nbytes for value in expected.values())
    assert all(metadata["format"] == "pt" for metadata in checkpoint.metadata.values())


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    single(sharded(tmp_path))
    assert list(open_checkpoint(tmp_path).shards) == ["model.safetensors"]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "no model.safetensors" in refusal(tmp_path)
    assert "cannot be read (No such file" in refusal(tmp_path / "absent")
    (tmp_path / "a\nb").mkdir()
    assert "no model.safetensors" in refusal(tmp_path / "a\nb")
    (tmp_path / "file").write_text("")
    assert "give the folder" in refusal(tmp_path / "file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    assert name in (message := refusal(tmp_path)) and "save_pretrained" in message


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).unlink()
    assert SHARDS[0] in (message := refusal(tmp_path)) and "neither" in message


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    (single(tmp_path) / "config.json").unlink()
    assert "config.json is missing" in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / SHARDS[1]).unlink()
    assert SHARDS[1] in (message := refusal(tmp_path)) and "missing" in message


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    os.truncate(sharded(tmp_path) / SHARDS[1], 200)
    assert SHARDS[1] in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_is_no_regular_file_is_refused_without_waiting_for_it(name: str, tmp_path: Path) -> None:
    (single(tmp_path) / name).unlink()
    os.mkfifo(tmp_path / name)
    refusal(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refusal(tmp_path)


def test_a_checkpoint_without_a_tensor_is_refused(tmp_path: Path) -> None:
    save_file({}, single(tmp_path) / "model.safetensors")
    assert "no tensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "..", ".", "", 3, None]
)
def test_an_index_may_only_name_files_beside_it(name: object, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    save_file(tensors(0, 1), tmp_path / "x.safetensors")
    write_index(folder, {"layers.0.weight": name})
    assert "do not use it" in refusal(folder)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"layers.0.weight": SHARDS[0]},
        {"layers.0.weight": SHARDS[0], "layers.1.weight": SHARDS[0], "more": SHARDS[0]},
        {"layers.0.weight": SHARDS[0], "layers.1.weight": SHARDS[1], "layers.2.weight": SHARDS[1]},
        {f"layers.{i}.weight": SHARDS[i % 2] for i in range(4)},
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(weight_map: dict, tmp_path: Path) -> None:
    write_index(sharded(tmp_path), weight_map)
    assert "disagrees" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).write_text(text)
    assert INDEX in refusal(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = single(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "leads out of the folder" in refusal(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    refusal(folder)


def test_a_link_to_the_folder_and_links_within_it_work(tmp_path: Path) -> None:
    folder = single(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "alias").symlink_to(folder)
    assert len(open_checkpoint(tmp_path / "alias").tensors) == 4


def hub_snapshot(cache: Path, blobs: Path) -> Path:
    """A Hub cache whose snapshot links to `blobs`, as huggingface_hub lays it out."""
    folder = sharded(cache / "models--org--name" / "snapshots" / "abc")
    blobs.mkdir(parents=True)
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name[::-1])
        path.symlink_to(os.path.relpath(blobs / path.name[::-1], folder))
    return folder


def test_a_hub_snapshot_may_link_to_its_own_blobs_and_to_the_shared_ones(tmp_path: Path) -> None:
    for cache, blobs in [("one", "one/models--org--name/blobs"), ("two", "two/blobs/ab")]:
        assert len(open_checkpoint(hub_snapshot(tmp_path / cache, tmp_path / blobs)).tensors) == 4


def test_a_hub_snapshot_may_not_link_to_another_model(tmp_path: Path) -> None:
    folder = hub_snapshot(tmp_path, tmp_path / "models--org--other" / "blobs")
    assert "leads out of the folder" in refusal(folder)


def test_the_fingerprint_is_the_same_however_the_tensors_are_split(tmp_path: Path) -> None:
    save_file({**tensors(0, 2), **tensors(2, 2)}, single(tmp_path / "one") / "model.safetensors")
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(sharded(tmp_path / "two"))
    assert one.fingerprint == two.fingerprint


def test_the_fingerprint_tells_values_names_and_shapes_apart(tmp_path: Path) -> None:
    made = [single(tmp_path / "a"), single(tmp_path / "b", seed=1)]
    for change in ({"renamed": tensors(0, 1)["layers.0.weight"]}, {"layers.0.weight": np.zeros((2, 2), "f4")}):
        made.append(single(tmp_path / f"c{len(made)}"))
        save_file({**tensors(1, 3), **change}, made[-1] / "model.safetensors")
    assert len({open_checkpoint(folder).fingerprint for folder in made}) == 4


def test_a_file_that_changes_while_in_use_is_noticed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single(tmp_path))
    save_file(tensors(0, 4, seed=1), tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed while in use"):
        checkpoint.read("layers.0.weight")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="gone while in use"):
        checkpoint.read("layers.0.weight")


TRUE = {f"layers.{i}.weight": SHARDS[i // 2] for i in range(4)}


def test_a_file_that_is_written_to_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    os.utime(single(tmp_path) / "model.safetensors", (0, 0))  # clocks of file systems are coarse
    shard = open_checkpoint(tmp_path).shards["model.safetensors"]
    with pytest.raises(CheckpointError, match="changed while in use"), shard.opened():
        shard.path.write_bytes(shard.path.read_bytes())


FILE = st.sampled_from([*SHARDS, "../secret.safetensors", "..", INDEX, "config.json"]) | st.text(max_size=8) | st.none()
NAME = st.sampled_from([*TRUE, "layers.4.weight"]) | st.text(max_size=3)


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(NAME, FILE, max_size=3), start=st.sampled_from([{}, TRUE]))
def test_any_index_is_refused_in_one_line_or_is_the_true_one(
    changes: dict, start: dict, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed_index" / "model"
    if not folder.exists():
        save_file(tensors(0, 4), sharded(folder).parent / "secret.safetensors")
    write_index(folder, {**start, **changes})
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        assert str(error).isprintable()
        assert {**start, **changes} != TRUE
    else:
        assert {name: span.shard for name, span in checkpoint.tensors.items()} == {**start, **changes} == TRUE


def test_neither_torch_nor_numpy_nor_transformers_is_imported() -> None:
    code = "import sys, dropformer.prune.files; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
