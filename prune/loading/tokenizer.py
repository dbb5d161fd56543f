"""The tokenizer beside a model, and why there is none where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dropformer.prune.errors import reason
from dropformer.prune.loading.quiet import quiet_transformers

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model")


def open_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, or None where none can be used: `why_no_tokenizer` tells the reason."""
    try:
        return _open(path, trust_remote_code)
    except Exception:  # files of many kinds, read by many libraries: each raises errors of its own
        return None


def why_no_tokenizer(path: Path, trust_remote_code: bool = False) -> str:
    """Why `open_tokenizer` gave None for a folder, in a few words."""
    if not any((path / name).exists() for name in FILES) and not any(path.glob("*.model")):
        return "has no tokenizer"
    try:
        _open(path, trust_remote_code)
    except Exception as error:
        if "trust_remote_code" in str(error):
            return "has a tokenizer with code of its own, which runs only with --trust-remote-code"
        return f"has a tokenizer that cannot be used ({type(error).__name__}: {reason(error, 200)})"
    return "has a tokenizer that was not opened"


def _open(path: Path, trust_remote_code: bool) -> Any:
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
