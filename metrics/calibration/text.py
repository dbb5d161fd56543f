"""Where calibration and evaluation text comes from: a name or a file gives an iterator of documents."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from dropformer.metrics.calibration.recall import recall
from dropformer.prune.errors import CalibrationError

SELF = "self"
HELD_OUT_SHARE = 4  # one builtin topic in four is never calibrated on


def documents(name: str) -> Iterator[str]:
    """The documents of a text: one of NAMED, or a .txt, .jsonl or .parquet file.

    Files: .txt is one document; .jsonl and .parquet have one a row, in the column `text`.
    Raises CalibrationError for an unknown name, a file that cannot be read, or no network.
    """
    if name in NAMED:
        return NAMED[name]()
    check_name(name)
    if writes_itself(name):
        raise CalibrationError(f"`{name}` is what one model writes itself, and no text for several; name another")
    return READERS[Path(name).suffix](Path(name))


def check_name(name: str) -> None:
    """Raise CalibrationError unless `name` is a text that `documents` can read, or prompts for the model to go on."""
    name = prompts_of(name) if writes_itself(name) else name
    path = Path(name)
    if name in NAMED:
        return
    if path.suffix not in READERS:
        names, kinds = ", ".join([*NAMED, SELF]), ", ".join(READERS)
        raise CalibrationError(f"text `{name}` is unknown; expected one of {names}, or a file ending in {kinds}")
    if not path.is_file():
        raise CalibrationError(f"text file {path} does not exist")


def writes_itself(name: str) -> bool:
    """Is this what the model writes itself: `self`, or `self:` with a text whose beginnings are the prompts?"""
    return name == SELF or name.startswith(f"{SELF}:")


def prompts_of(name: str) -> str:
    """The text that gives the prompts: of `self:FILE` the file, of `self` the builtin one."""
    return name.partition(":")[2] or "builtin"


def _builtin() -> Iterator[str]:
    """Python's own documentation topics (`pydoc_data.topics`), less those held out."""
    return (text for key, text in _topics() if not _is_held_out(key))


def _held_out() -> Iterator[str]:
    """The documentation topics that `builtin` never gives: for perplexity after calibration on it."""
    return (text for key, text in _topics() if _is_held_out(key))


def _recall() -> Iterator[str]:
    """Text that needs its far past, made of the builtin topics."""
    return recall(_builtin())


def _docstrings() -> Iterator[str]:
    """Documentation of torch's functions: another domain than most texts that one calibrates on."""
    import torch

    found = {name: getattr(torch, name).__doc__ for name in sorted(dir(torch)) if name.islower()}
    return (text for text in found.values() if isinstance(text, str) and len(text) > 400)


def _topics() -> list[tuple[str, str]]:
    """Topics by name; a text with several names counts under the first, so that no text is in two topics."""
    from pydoc_data.topics import topics

    first = {text: key for key, text in sorted(topics.items(), reverse=True)}
    return sorted((key, text) for text, key in first.items())


def _is_held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def _hub(path: str, config: str, split: str, **fields: str) -> Iterator[str]:
    """A Hub data set, streamed.  The validation splits are what the published drop lists were made on."""
    from datasets import load_dataset

    try:
        for row in load_dataset(path, config, split=split, streaming=True, **fields):
            if row["text"].strip():
                yield row["text"]
    except (OSError, ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"data set {path} cannot be read ({said}); check the network, or use --calibration builtin or a file"
        ) from None


NAMED: dict[str, Callable[[], Iterator[str]]] = {
    "builtin": _builtin,
    "heldout": _held_out,
    "docstrings": _docstrings,
    "recall": _recall,
    "c4": lambda: _hub("allenai/c4", "en", "validation"),
    "wikitext": lambda: _hub("Salesforce/wikitext", "wikitext-2-raw-v1", "validation"),
}


def _txt(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"text file {path} is not UTF-8: {error}") from None


def _jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:  # json decodes, so that bytes that are not UTF-8 are an error of their line
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise CalibrationError(
                    f'{path}, line {number}: expected a JSON object with a text under "text", the same in '
                    'every line (or "prompt" and "completion", or "messages")'
                )
            yield text


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        columns = {field.name: str(field.type) for field in table.schema_arrow}
        if "string" not in columns.get("text", ""):
            raise CalibrationError(f"{path} has no column `text` of strings; its columns: {', '.join(columns)}")
        for batch in table.iter_batches(columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise CalibrationError(f"{path} cannot be read as parquet: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
