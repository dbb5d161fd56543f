"""Files beside the weights that may name blocks by number: read, followed, written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dropformer.prune.block_map import BlockMap
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.outline import Outline
from dropformer.prune.surgery.block_numbers import BlockNumbers

GENERATION = "generation_config.json"
# Files of tokenizers and of dropformer, and config.json, which is followed field by field.
APART = ("config.json", "dropformer.json", "plan.json", "scores.json", "report.json", "vocab.json", "merges.txt")
TOKENS = ("token", "special_tokens_map", "chat_template", "added_tokens", "processor", "README")
LARGEST = 4 << 20  # bytes; settings are smaller


def followed_files(folder: Path, outline: Outline, block_map: BlockMap) -> dict[str, str]:
    """The files in a folder whose settings change with the blocks' numbers, by name, as they are to be.

    Raises ArchitectureError naming the file and the field for what cannot be followed.
    """
    numbers = BlockNumbers(outline, block_map)
    found = {}
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".json", ".yaml", ".yml") or not _settings(path):
            continue
        old = _read(path)
        if not isinstance(old, dict):
            continue
        try:
            new = numbers.generation(old) if path.name == GENERATION else numbers.follow(old)
        except ArchitectureError as error:
            raise ArchitectureError(f"{error} (in {path.name})") from None
        if new != old:
            found[path.name] = _written(path, new)
    return found


def follow_files(folder: Path, outline: Outline, block_map: BlockMap) -> None:
    """Rewrite the files in a pruned checkpoint's folder that name blocks by number."""
    for name, text in followed_files(folder, outline, block_map).items():
        (folder / name).write_text(text, encoding="utf-8")


def _settings(path: Path) -> bool:
    apart = path.name in APART or path.name.endswith(".index.json") or any(part in path.name for part in TOKENS)
    return not apart and path.is_file() and path.stat().st_size <= LARGEST


def _read(path: Path) -> Any:
    """The file's content; None where it is neither JSON nor YAML."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _written(path: Path, fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(fields, sort_keys=False)
