"""What lies beside the weights: carried over, left behind and named, or refused."""

import os
from pathlib import Path

import pytest

from dropformer.prune.errors import CheckpointError
from dropformer.prune.files.side_files import copy_side_files, list_side_files, sort_side_files


def folder_of(place: Path, *names: str) -> Path:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
    return place


CARRIED = (
    "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json", "2_Dense/model.safetensors", "source.spm",
    "bpe.codes", "vocab.bpe", "tokenizer.model.v3", "tokenization_own.py", "own_code/layers.py", "merges.txt",
    "generation_config.json", "LICENSE", "speaker_embeddings/a.npy", "spiece.model.old", ".hidden",
)  # fmt: skip
LEFT = ("pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "original/params.json", "original/a.00.pth",
        "pytorch_model.bin.index.json", "tf_model.h5", "checkpoint-5/optimizer.pt", "MODEL.GGUF")  # fmt: skip


def test_all_but_weights_is_carried_over_and_weights_are_named(tmp_path: Path) -> None:
    own = ("model.safetensors", "model.safetensors.index.json", "config.json", "README.md", ".git/config")
    source = folder_of(tmp_path / "a", *CARRIED, *LEFT, *own)
    found = copy_side_files(source, folder_of(tmp_path / "b", "generation_config.json"))
    assert set(found.carried) == set(CARRIED) and set(found.left) == set(LEFT)
    copied = {path.relative_to(tmp_path / "b").as_posix() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert copied == set(CARRIED)
    assert found.note and all(name in found.note for name in LEFT)


def test_what_the_format_has_written_stays(tmp_path: Path) -> None:
    source, target = folder_of(tmp_path / "a", "generation_config.json"), folder_of(tmp_path / "b")
    target.mkdir()
    (target / "generation_config.json").write_text("new")
    copy_side_files(source, target)
    assert (target / "generation_config.json").read_text() == "new"


def test_code_that_would_be_hidden_by_other_code_of_its_name_is_refused(tmp_path: Path) -> None:
    source, target = folder_of(tmp_path / "a", "window_cache.py"), folder_of(tmp_path / "b", "window_cache.py")
    copy_side_files(source, target)
    (target / "window_cache.py").write_text("ours")
    with pytest.raises(CheckpointError, match=r"window_cache\.py has the name of code"):
        copy_side_files(source, target)


def test_folders_that_modules_json_names_are_carried_with_their_weights(tmp_path: Path) -> None:
    folder_of(tmp_path, "head/model.safetensors", "other/model.safetensors")
    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "head"}]')
    found = list_side_files(tmp_path)
    assert found.carried == ("head/model.safetensors", "modules.json") and found.left == ("other/model.safetensors",)


def test_nothing_is_said_where_nothing_is_left() -> None:
    assert sort_side_files(["model.safetensors", "tokenizer.json"]).note is None


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json", "notes"])
def test_a_side_file_that_links_out_of_the_folder_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("key")
    path = tmp_path / "m" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name}: a link that leads out"):
        list_side_files(tmp_path / "m")


def test_a_folder_that_links_out_and_a_dangling_link_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "assets").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="assets: a link that leads out"):
        list_side_files(tmp_path / "m")
    (tmp_path / "m" / "assets").unlink()
    (tmp_path / "m" / "merges.txt").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"merges\.txt: missing"):
        list_side_files(tmp_path / "m")


def test_links_within_the_folder_and_to_the_hub_caches_blobs_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    folder_of(snapshot, "a.txt")
    folder_of(snapshot.parents[1], "blobs/1", "refs/main")
    (snapshot / "b.txt").symlink_to("a.txt")
    (snapshot / "c.txt").symlink_to("../../blobs/1")
    (tmp_path / "out").mkdir()
    assert copy_side_files(snapshot, tmp_path / "out").carried == ("a.txt", "b.txt", "c.txt")
    assert (tmp_path / "out" / "c.txt").read_text() == "blobs/1" and not (tmp_path / "out" / "c.txt").is_symlink()
    (snapshot / "d.txt").symlink_to("../../refs/main")
    with pytest.raises(CheckpointError, match=r"d\.txt"):
        list_side_files(snapshot)


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a regular file"):
        list_side_files(tmp_path)


def test_json_that_would_take_gigabytes_to_parse_is_refused_unparsed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(b'{"a":[' + b"[]," * 7_000_000 + b"[]]}")
    with pytest.raises(CheckpointError, match="JSON values"):
        list_side_files(tmp_path)


def test_a_folder_of_everything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dropformer.prune.files.side_files.MOST_FILES", 3)
    with pytest.raises(CheckpointError, match="a folder of its own"):
        list_side_files(folder_of(tmp_path, *"abcd"))


def test_a_file_without_end_is_refused_by_name(tmp_path: Path) -> None:
    with (tmp_path / "chat_template.jinja").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: more than 4 GiB"):
        list_side_files(tmp_path)
