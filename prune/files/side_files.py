"""The files beside a checkpoint's weights: copied to the pruned checkpoint, or left behind and listed.

Everything except weights is copied: tokenizers, chat templates, the code that config.json names, the module folders of
sentence-transformers (with their own small weights).  Weights in other formats and folders with such weights (`onnx/`,
`original/`) are the dense model's and are left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dropformer.prune.errors import CheckpointError, shown
from dropformer.prune.files.folder import TEMPORARY
from dropformer.prune.files.regular import check_inside, file_behind, opened
from dropformer.prune.files.strict_json import CONFIG_BYTES, MAX_VALUES

WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".pkl",
    ".pickle", ".ot", ".tflite", ".pdparams", ".mlmodel", ".nemo", ".engine", ".pb", ".distcp", ".llamafile", ".keras",
    ".index.json",
)  # fmt: skip
"""Suffixes of weight and index files."""

REWRITTEN = {"config.json", "README.md", "dropformer.json", "plan.json", "scores.json", "report.json", "report.html"}
"""Files that are written anew for the pruned checkpoint."""

UNTOLD = (".git", ".cache", ".gitattributes", ".gitignore", "__pycache__", ".DS_Store", ".ipynb_checkpoints")
"""Files of version control, downloads and editors: neither copied nor listed."""

ADAPTER = "adapter_config.json"
MERGE = "merge it first (peft: merge_and_unload(), then save_pretrained)"
MODULE_FOLDER = re.compile(r"\d+_\w+")  # 1_Pooling, 2_Dense: sentence-transformers' modules
MOST_FILES = 10_000
JSON_BYTES = 128 << 20
TOKENIZER_VALUES = 6_000_000  # Gemma 3's tokenizer.json has 2 million
DEEPEST = 8
LARGEST = 4 << 30  # bytes of a file that is no weights


@dataclass(frozen=True)
class SideFiles:
    """Paths relative to the model's folder, with slashes, sorted."""

    carried: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def note(self) -> str | None:
        """A line that lists the files left behind, None if there are none."""
        if not self.left:
            return None
        named = ", ".join(shown(name) for name in self.left[:40])
        more = f" and {len(self.left) - 40} more" if len(self.left) > 40 else ""
        return f"not copied, as weights of the dense model or beside them: {named}{more}"


def sort_side_files(
    names: Iterable[str], modules: Collection[str] = (), shards: Collection[str] | None = None
) -> SideFiles:
    """Sort the files of a model's folder into copied and left behind.

    modules: folders named by modules.json of sentence-transformers, copied with their weights.  Neither are the
    files in `REWRITTEN` and the model's own safetensors (`shards`; None: all at the top).
    """
    names = sorted(name for name in names if not any(_untold(part) for part in PurePosixPath(name).parts))
    heavy = {PurePosixPath(name).parts[0] for name in names if "/" in name and _is_weight(name)}
    whole = {folder for folder in heavy if MODULE_FOLDER.fullmatch(folder) or folder in modules}
    carried: list[str] = []
    left: list[str] = []
    for name in names:
        top = PurePosixPath(name).parts[0]
        own = name.endswith(".safetensors") if shards is None else name in shards
        if name in REWRITTEN or ("/" not in name and (own or name.endswith(".safetensors.index.json"))):
            continue
        stays = top in heavy if "/" in name else _is_weight(name)
        (left if stays and top not in whole else carried).append(name)
    return SideFiles(tuple(carried), tuple(left))


def list_side_files(folder: Path) -> SideFiles:
    """`sort_side_files` for a folder on disk.

    Raises CheckpointError, naming the file, for a link out of the folder (other than to the Hub cache's blobs), for a
    FIFO or a device, and for a folder with too many files or levels.
    """
    names: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _untold(name))
        inside = Path(place).relative_to(folder)
        for name in folders:
            if Path(place, name).is_symlink():
                check_inside(folder, (inside / name).as_posix())
        names += [(inside / name).as_posix() for name in files if not _untold(name)]
        if len(names) > MOST_FILES or len(inside.parts) > DEEPEST:
            raise CheckpointError(
                f"{shown(folder, 1000)}: more than {MOST_FILES:,} files or {DEEPEST} folders deep; "
                "give the model a folder of its own"
            )
    for name in names:
        path = file_behind(folder, name)
        if path.stat().st_size > LARGEST and not _is_weight(name):
            raise CheckpointError(
                f"{shown(folder / name, 1000)}: more than {LARGEST >> 30} GiB, and no weights; move it elsewhere"
            )
        if name.endswith(".json"):
            _check_json(path, shown(folder / name, 1000), TOKENIZER_VALUES if "token" in name else MAX_VALUES)
    return sort_side_files(names, _module_folders(folder), _shards(folder))


def check_no_adapter(names: Collection[str], where: object) -> None:
    """Raises CheckpointError for an adapter among a model's files, which transformers would apply on loading."""
    if ADAPTER in names and "config.json" in names:
        raise CheckpointError(
            f"{where}: {ADAPTER} is an adapter beside the model, which transformers applies on loading; {MERGE}, or "
            "move it out of the folder"
        )
    if ADAPTER in names:
        raise CheckpointError(f"{where} is an adapter, not a model; {MERGE.replace('it', 'it into its model', 1)}")


def copy_side_files(source: Path, target: Path) -> SideFiles:
    """Copy the side files of a model's folder; files that exist in `target` stay.

    Raises as `list_side_files`, and for code of the model's own that has the name of other code in `target`.
    """
    found = list_side_files(source)
    for name in found.carried:
        place = target / name
        if not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file_behind(source, name), place)
        elif name.endswith(".py") and place.read_bytes() != file_behind(source, name).read_bytes():
            raise CheckpointError(
                f"{shown(source / name, 1000)} has the name of code that pruned checkpoints carry; rename it there and "
                "where it is imported"
            )
    return found


def _is_weight(name: str) -> bool:
    return name.lower().endswith(WEIGHTS)


def _untold(part: str) -> bool:
    return part in UNTOLD or part.startswith(TEMPORARY)


def _shards(folder: Path) -> set[str]:
    """The files that hold the model, by its index; whatever is wrong with that is told where it is opened."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.is_file():
        return {"model.safetensors"}
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError):
        return set(map(str, json.loads(index.read_bytes())["weight_map"].values()))
    return set()


def _module_folders(folder: Path) -> set[str]:
    """Top folders that modules.json of sentence-transformers names; empty if it cannot be read."""
    path = folder / "modules.json"
    if not path.is_file() or path.stat().st_size > CONFIG_BYTES:
        return set()
    try:
        return {str(entry["path"]).partition("/")[0] for entry in json.loads(path.read_bytes()) if entry["path"]}
    except (ValueError, LookupError, TypeError, RecursionError):
        return set()


def _check_json(path: Path, where: str, values: int) -> None:
    """Raises CheckpointError for JSON that would take minutes or hundreds of megabytes to parse."""
    size = path.stat().st_size
    if size < values:
        return
    with opened(path) as file:
        raw = file.read(JSON_BYTES + 1)
    if size > JSON_BYTES or sum(raw.count(mark) for mark in (b",", b"[", b"{")) > values:
        raise CheckpointError(f"{where}: more than {values:,} JSON values or {JSON_BYTES:,} bytes; do not use it")


def weights_of(names: Sequence[str]) -> list[str]:
    """The safetensors files and index at the top of a repository, without Mistral's second copy (consolidated)."""
    top = [name for name in names if "/" not in name and not name.startswith("consolidated")]
    return [name for name in top if name.endswith((".safetensors", ".safetensors.index.json"))]
