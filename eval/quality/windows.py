"""Fixed windows of a text, for perplexity: the same text, tokenizer, length and limit give the same windows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dropformer.metrics.calibration.text import documents
from dropformer.metrics.calibration.windows import bos
from dropformer.prune.errors import CalibrationError, EvaluationError


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int = 512, limit: int | None = None) -> Tensor:
    """Token ids [N, length] int64: the documents of `text` laid end to end and cut, from the start, no overlap.

    text: a name (`heldout`, `wikitext`, `c4`, ...) or a .txt, .jsonl or .parquet file, as in `metrics.text`.
    Each window begins with the BOS token where the tokenizer adds one. At most `limit` windows; what is left
    at the end is too short for one and is dropped. Raises EvaluationError for a text that cannot be had or is
    shorter than one window.
    """
    if length < 2 or (limit is not None and limit < 1):
        raise EvaluationError(f"{limit} windows of {length} tokens cannot be; expected at least 1 of at least 2 tokens")
    start = bos(tokenizer)
    body = length - len(start)
    rows: list[list[int]] = []
    rest: list[int] = []
    try:
        for document in documents(text):
            rest += tokenizer(document + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
            whole = len(rest) // body * body
            rows += [start + rest[i : i + body] for i in range(0, whole, body)]
            rest = rest[whole:]
            if limit is not None and len(rows) >= limit:
                break
    except CalibrationError as error:
        raise EvaluationError(str(error)) from error
    if not rows:
        raise EvaluationError(f"{text} has fewer than {length} tokens; take a longer text or a shorter window")
    return torch.tensor(rows[:limit], dtype=torch.int64)
