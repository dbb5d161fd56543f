"""The tokenizer beside a model, and why there is none where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dropformer.prune.errors import ModelError, reason
from dropformer.prune.loading.parts import input_embeddings
from dropformer.prune.loading.quiet import quiet_transformers

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model")


def open_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, or None where none can be used: `why_no_tokenizer` tells the reason."""
    try:
        return _open(path, trust_remote_code)
    except Exception:  # files of many kinds, read by many libraries: each raises errors of its own
        return None


def why_no_tokenizer(path: Path) -> str:
    """Why `open_tokenizer` gave None for a folder, in a few words."""
    if not any((path / name).exists() for name in FILES) and not any(path.glob("*.model")):
        return "has no tokenizer"
    try:
        _open(path, False)
    except Exception as error:
        if "trust_remote_code" in str(error):
            return "has a tokenizer with code of its own, which runs only with --trust-remote-code"
        return f"has a tokenizer that cannot be used ({type(error).__name__}: {reason(error, 200)})"
    return "has a tokenizer that was not opened"


def bound_tokens(tokenizer: Any, model: Any) -> None:
    """Where a tokenizer has tokens beyond the model's embedding, let them end in a ModelError when they are read.

    Nothing is hooked otherwise.  A padding token beyond the embedding is taken from the tokenizer: it was added
    without a row, and no masked token needs one.
    """
    table = input_embeddings(model)
    rows = getattr(table, "num_embeddings", None)
    if tokenizer is None or table is None or not isinstance(rows, int):
        return
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest < rows:
        return
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = None

    def check(_module: Any, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].numel() and not args[0].is_meta:
            token = int(args[0].max())
            if token >= rows:
                raise ModelError(
                    f"the text has token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), and the model's "
                    f"embedding has {rows} rows; use the tokenizer that the model was trained with, or a text "
                    "without tokens that were added later"
                )

    table.register_forward_pre_hook(check)


def _open(path: Path, trust_remote_code: bool) -> Any:
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer("a b")  # settings of a wrong type are noticed here, not by a caller
    if not _has_vocabulary(tokenizer, path):
        raise ModelError("its vocabulary is missing")
    return tokenizer


def _has_vocabulary(tokenizer: Any, path: Path) -> bool:
    """Whether the files hold the words of a tokenizer that has any.

    Without them transformers builds many tokenizers with special tokens alone, which read any text as unknown tokens
    or as none.  Those of bytes name no files and need none.
    """
    names = set(tokenizer.vocab_files_names.values())
    found = {file.name for pattern in ("tokenizer*.json", "*.model", "*.tiktoken") for file in path.glob(pattern)}
    found -= {"tokenizer_config.json"}
    return not names or bool(found) or any((path / name).exists() for name in names)
