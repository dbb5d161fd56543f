"""Files beside the weights that may name or count blocks: read, renumbered, written."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from dropformer.prune.block_map import BlockMap
from dropformer.prune.errors import ArchitectureError, CheckpointError, shown
from dropformer.prune.files.config_json import BLOCK_COUNTS
from dropformer.prune.files.regular import opened
from dropformer.prune.files.side_files import list_side_files
from dropformer.prune.files.strict_json import MAX_DEPTH
from dropformer.prune.outline import Outline
from dropformer.prune.surgery.block_numbers import LEAVES, BlockNumbers

GENERATION = "generation_config.json"
SETTINGS = (".json", ".yaml", ".yml")
# Files of other forms, searched for the name of a block: settings, and llama.cpp's importance matrices.
SEARCHED = (".txt", ".toml", ".ini", ".cfg", ".conf", ".csv", ".tsv", ".xml", ".jsonl", ".dat", ".imatrix", "")
# Files of tokenizers and of dropformer, and config.json, which is followed field by field.
APART = ("config.json", "dropformer.json", "plan.json", "scores.json", "report.json", "vocab.json", "merges.txt")
TOKENS = (
    "token",
    "special_tokens_map",
    "chat_template",
    "added_tokens",
    "processor",
    "README",
    "vocab",
    "LICEN",
    "NOTICE",
)
# Names of files that may be of one block: layer_3.npy, layers/3/mean.npy.
NUMBERED = re.compile(r"(?<![a-z])(?:layers?|blocks?|blk)[_\-./ ]?\d+(?![A-Za-z\d])", re.I)
LARGEST = 4 << 20  # bytes; settings are smaller
MOST = 500_000  # values


def followed_files(folder: Path, outline: Outline, block_map: BlockMap, own: Collection[str] = ()) -> dict[str, str]:
    """New contents, by name, of the files in a folder whose settings change with the blocks' numbers.

    `own`: files that were written for the pruned model and are right.  Raises ArchitectureError naming the file and the
    field for what cannot be followed.
    """
    numbers = BlockNumbers(outline, block_map)
    found = {}
    if numbers.moved:
        _check_names(folder)
    for name in (name for name in _names(folder) if name not in own):
        path = folder / name
        try:
            if path.suffix not in SETTINGS:
                _check_text(path, numbers)
                continue
            old = _read(path)
            new = _followed(name, old, numbers)
        except ArchitectureError as error:
            raise ArchitectureError(f"{error} (in {name})") from None
        if new != old:
            found[name] = _written(path, new)
    return found


def follow_files(folder: Path, outline: Outline, block_map: BlockMap, own: Collection[str] = ()) -> None:
    """Rewrite the files in a pruned checkpoint's folder that name blocks by number, its `own` left out."""
    for name, text in followed_files(folder, outline, block_map, own).items():
        (folder / name).write_text(text, encoding="utf-8")


def _check_names(folder: Path) -> None:
    """Raises ArchitectureError for a file that is copied and named after a block, and whose content is not read."""
    for name in list_side_files(folder).carried:
        if NUMBERED.search(name) and not name.endswith(".py"):
            raise ArchitectureError(f"blocks stay where they are: {name} is named after one of them")


def _names(folder: Path) -> Iterator[str]:
    """The settings in a folder and below it, by path, that are read here."""
    for name in list_side_files(folder).carried:
        path = folder / name
        apart = name in APART or path.suffix not in (*SETTINGS, *SEARCHED) or any(part in path.name for part in TOKENS)
        if not apart and (path.suffix not in SETTINGS or path.stat().st_size <= LARGEST):
            yield name


def _followed(name: str, old: Any, numbers: BlockNumbers) -> Any:
    """What a file holds, under the new numbers.  Raises ArchitectureError."""
    if not isinstance(old, (dict, list)):
        return old
    if name == GENERATION and isinstance(old, dict):
        return numbers.generation(old)
    new = numbers.follow(old)
    if numbers.moved:
        counts = COUNTS if isinstance(new, dict) and "/" not in name else set()
        numbers.check_settings({k: v for k, v in new.items() if k not in counts} if counts else new, "")
        new = _counted(new, numbers) if counts else new
    return new


COUNTS = {field for fields in BLOCK_COUNTS.values() for field in fields}


def _counted(fields: dict[str, Any], numbers: BlockNumbers) -> dict[str, Any]:
    """A file at the top that counts the blocks of the one stack (Mistral's params.json: n_layers)."""
    counted = {key: value for key, value in fields.items() if key in COUNTS and type(value) is int}
    if not counted:
        return fields
    stacks = numbers.outline.stacks
    if len(stacks) > 1 or set(counted.values()) != {stacks[0].blocks}:
        raise ArchitectureError(f"blocks stay where they are: {', '.join(counted)} may count them")
    return {**fields, **dict.fromkeys(counted, len(numbers.block_map.stacks[stacks[0].name]))}


def _check_text(path: Path, numbers: BlockNumbers) -> None:
    """Raises ArchitectureError where a file that is not followed names a block, and blocks move."""
    if not numbers.moved:
        return
    with opened(path) as file:
        text = file.read(LARGEST).decode("utf-8", "replace")
    names = "|".join({*LEAVES, *(stack.path.rpartition(".")[2] for stack in numbers.outline.stacks)} - {"h"})
    found = re.search(rf"(?<![A-Za-z0-9_])(?:({names})\.\d+|transformer\.h\.\d+|blk\.\d+)", text)
    if found:
        raise ArchitectureError(f"blocks stay where they are: a file names one of them, `{found[0]}`")


def _read(path: Path) -> Any:
    """The file's content; None where it is neither JSON nor YAML.

    Raises CheckpointError for one whose values, with YAML's aliases written out, are too many or too deep to follow.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    values, layer = 0, [found]
    for _ in range(MAX_DEPTH):
        layer = [item for item in layer if isinstance(item, (dict, list))]
        values += sum(map(len, layer))
        if not layer or values > MOST:
            break
        layer = [inner for item in layer for inner in (item.values() if isinstance(item, dict) else item)]
    if layer:
        raise CheckpointError(f"{shown(path, 1000)}: more than {MOST:,} values or {MAX_DEPTH} levels; do not use it")
    return found


def _written(path: Path, fields: Any) -> str:
    return json.dumps(fields, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(fields, sort_keys=False)
