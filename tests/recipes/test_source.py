import json

import pytest

from dropformer.prune.errors import CheckpointError, ModelError
from dropformer.recipes import open_config, open_source
from dropformer.recipes.source import locate


@pytest.fixture
def folder(tmp_path):
    """A folder in the Hugging Face layout, as far as opening it looks."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_a_folder_is_taken_as_it_is(folder):
    source = open_source(str(folder))
    assert (source.path, source.revision, source.recipe, source.kind) == (folder, None, None, "folder")
    assert str(source) == str(folder)
    assert open_config(str(folder)).path == folder


def test_a_folder_comes_before_a_recipe_or_a_hub_id_of_that_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mistral-7b", "org/name", "org/name@v1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        folder.rename(tmp_path / name)
        assert open_source(name).kind == "folder"
        (tmp_path / name).rename(folder)


def test_the_home_folder_may_be_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_source("~/model").path == folder


def test_a_gguf_file_is_opened_as_a_converted_folder(tmp_path, tiny, own_cache):
    path = tiny.write(tmp_path / "tiny.GGUF", tiny.llama())
    source = open_source(str(path))
    assert source.kind == "gguf" and source.path.is_relative_to(own_cache)
    assert open_config(str(path)) == source


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "has no config.json"), ("{", "not valid JSON"), ("[]", "expected a JSON object"), ("{}", "no model_type")],
)
def test_a_folder_needs_a_config_that_is_a_json_object(folder, content, complaint):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    for opener in (open_source, open_config):
        with pytest.raises(CheckpointError, match=complaint) as caught:
            opener(str(folder))
        assert "\n" not in str(caught.value)


def test_a_folder_with_only_pickles_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles \(pytorch_model.bin\)"):
        open_source(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        open_source(str(folder))


def test_a_folder_around_a_gguf_file_says_to_give_the_file(folder):
    (folder / "config.json").unlink()
    (folder / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"it has x\.gguf: give that file"):
        open_source(str(folder))


def test_a_file_of_another_kind_is_refused(folder):
    with pytest.raises(ModelError, match="of an unknown type; expected a folder"):
        open_source(str(folder / "model.safetensors"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "x.gguf", "out/x.gguf", "~/nowhere"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ModelError, match="does not exist"):
        open_source(name)


def test_a_misspelt_recipe_is_answered_with_what_is_accepted_and_the_closest_names():
    for opener in (open_source, open_config):
        with pytest.raises(ModelError, match=r"a folder, a \.gguf file.*did you mean smollm2-135m") as caught:
            opener("smolm2-135m")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b/c", "a/b/c", "@v1", "org/../x"])
def test_what_can_be_no_model_at_all_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        open_source(name)


def test_a_revision_is_for_hub_models_only_and_given_once(folder):
    with pytest.raises(ModelError, match="has no revision v1"):
        open_source(str(folder), revision="v1")
    with pytest.raises(ModelError, match="has no revision v1"):
        open_source("smollm2-135m", revision="v1")
    with pytest.raises(ModelError, match="give one revision"):
        open_source("org/name@v1", revision="v2")
    with pytest.raises(ModelError, match="give one revision"):
        open_source("org/name@")


def test_what_can_be_told_without_network_is_told_by_locate(folder, tmp_path):
    assert locate(str(folder)) == folder
    assert locate("smollm2-135m") is None and locate("org/name@v1") is None
    for name in ("smolm2", str(tmp_path / "none"), str(folder / "model.safetensors")):
        with pytest.raises(ModelError, match="expected a folder"):
            locate(name)
