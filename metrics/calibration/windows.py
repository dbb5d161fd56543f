"""Calibration windows: token ids of a fixed length, deterministic for a text, tokenizer and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dropformer.metrics.calibration.completions import completion_rows, has_completions
from dropformer.metrics.calibration.settings import Calibration, CalibrationRef
from dropformer.metrics.calibration.text import documents
from dropformer.prune.errors import CalibrationError

FREE_PADDING = 32  # tokens in a batch


@dataclass(frozen=True)
class Windows:
    """Token ids [N, T] int64; `scored` [N, T] bool marks scored positions, `padding` [N, T] bool real tokens.

    For a loss, a scored position counts the prediction of its own token.
    """

    ids: Tensor
    scored: Tensor
    padding: Tensor
    ref: CalibrationRef

    def __len__(self) -> int:
        return self.ids.shape[0]

    def lengths(self) -> list[int]:
        """Tokens per window, without padding."""
        return self.padding.sum(1).tolist()

    @property
    def partly_scored(self) -> Tensor | None:
        """`scored`, or None if every position is scored."""
        return None if self.scored.all() else self.scored

    def batches(self, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """(model inputs, scored positions) for `size` windows at a time, sorted by length to reduce padding.

        The sort is stable; there is no attention mask without padding.
        """
        lengths = self.lengths()
        order = by_length(lengths)
        for part in alike([lengths[i] for i in order], size):
            yield self.batch(order[part])

    def batch(self, which: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """(model inputs, scored positions) of these windows, without columns that are padding in all of them."""
        rows = list(which)
        width = int(self.padding[rows].sum(1).max())
        padding = self.padding[rows, :width]
        inputs = {"input_ids": self.ids[rows, :width]}
        if not padding.all():
            inputs["attention_mask"] = padding.long()
        return inputs, self.scored[rows, :width]


def named_texts(data: Sequence[Windows]) -> dict[str, Any]:
    """The texts of several sets of windows, as artifacts record them."""
    texts = [windows.ref.model_dump() for windows in data]
    return texts[0] if len(texts) == 1 else {"name": ",".join(text["name"] for text in texts), "texts": texts}


def by_length(lengths: Sequence[int]) -> list[int]:
    """Indices from the shortest to the longest window, in a stable order."""
    return sorted(range(len(lengths)), key=lambda i: lengths[i])


def alike(ordered: Sequence[int], size: int) -> Iterator[slice]:
    """Cut rising lengths into batches of at most `size` windows, of which at most an eighth is padding.

    A few tokens of padding are always allowed, as a forward pass costs more than they do.  For example 100, 110, 300
    by threes: 100 and 110 run together, 300 alone.
    """
    first = 0
    for i in range(1, len(ordered) + 1):
        if i < len(ordered) and i - first < size:
            needed, computed = sum(ordered[first : i + 1]), (i + 1 - first) * ordered[i]
            if computed - needed <= max(FREE_PADDING, needed / 8):
                continue
        yield slice(first, i)
        first = i


def computed_tokens(lengths: Sequence[int], size: int) -> int:
    """Tokens computed, padding included, for windows of these lengths, sorted, in batches of at most `size`.

    For example [2, 9, 3, 8] by twos: 2 and 3 run as 2 x 3, 8 and 9 as 2 x 9, 24 tokens for the 22 needed.
    """
    ordered = [lengths[i] for i in by_length(lengths)]
    return sum(len(ordered[part]) * ordered[part][-1] for part in alike(ordered, size))


def windows(calibration: Calibration, tokenizer: Any) -> Windows:
    """Tokenize the calibration text into windows.  Raises CalibrationError if there is too little text."""
    if calibration.samples < 1 or calibration.length < 2 or not 0 <= calibration.skip_first < calibration.length:
        raise CalibrationError("calibration needs at least 1 window of 2 tokens, and fewer skipped tokens than that")
    if has_completions(calibration.name):
        return _completions(calibration, tokenizer)
    make = _packed if calibration.packed else _one_document_each
    ids, padding = make(calibration, tokenizer)
    return scored_windows(calibration, ids, padding, padding)


def scored_windows(calibration: Calibration, ids: Tensor, padding: Tensor, counts: Tensor) -> Windows:
    """Windows of these ids [N, T] with their record; the first `skip_first` tokens are not scored."""
    scored = counts.clone()
    scored[:, : calibration.skip_first] = False
    digest = hashlib.sha256(ids.numpy().tobytes() + scored.numpy().tobytes()).hexdigest()
    fields = {f: getattr(calibration, f) for f in ("name", "length", "seed", "packed", "skip_first")}
    return Windows(ids, scored, padding, CalibrationRef(samples=len(ids), hash=digest, **fields))


def _completions(calibration: Calibration, tokenizer: Any) -> Windows:
    """One window per prompt with completion, or per conversation; only completions are scored."""
    first = max(1, calibration.skip_first)
    found = completion_rows(calibration.name, tokenizer, calibration.length)
    rows = [row for row in found if any(row[1][first:])]
    which = picked([ids for ids, _ in rows], calibration, "completions within")
    ids, padding = padded([rows[i][0] for i in which], tokenizer)
    counts, _ = padded([rows[i][1] for i in which], None)
    counts[:, 0] = 0  # the first token has no prediction
    return scored_windows(replace(calibration, packed=False), ids, padding, counts.bool())


def _packed(calibration: Calibration, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Random windows of the concatenated documents, each with the tokenizer's special tokens around it."""
    start, end = frame(tokenizer)
    body = calibration.length - len(start) - len(end)
    if body < 1:
        raise CalibrationError(f"{calibration.length} tokens leave no room beside special tokens; raise --length")
    rows: list[list[int]] = []
    rest: list[int] = []
    wanted = calibration.samples if calibration.name not in FINITE else None
    for text in documents(calibration.name):
        rest += tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        rows += [start + rest[i : i + body] + end for i in range(0, len(rest) - body + 1, body)]
        rest = rest[len(rest) // body * body :]
        if wanted and len(rows) >= wanted * STREAM_POOL:
            break
    return _sampled(rows, calibration, tokenizer)


FINITE = ("builtin", "heldout", "docstrings")
STREAM_POOL = 4  # windows read from a stream per window used, for the seed to choose from


def _one_document_each(calibration: Calibration, tokenizer: Any) -> tuple[Tensor, Tensor]:
    rows = []
    for text in documents(calibration.name):
        ids = tokenizer(text, truncation=True, max_length=calibration.length, verbose=False)["input_ids"]
        if len(ids) > max(1, calibration.skip_first):
            rows.append(ids)
        if calibration.name not in FINITE and len(rows) >= calibration.samples * STREAM_POOL:
            break
    return _sampled(rows, calibration, tokenizer)


def _sampled(rows: list[list[int]], calibration: Calibration, tokenizer: Any) -> tuple[Tensor, Tensor]:
    return padded([rows[i] for i in picked(rows, calibration, "windows of")], tokenizer)


def picked(rows: Sequence[Any], calibration: Calibration, what: str) -> list[int]:
    """Indices of the rows that the seed draws.  Raises CalibrationError if there are too few."""
    if len(rows) < calibration.samples:
        raise CalibrationError(
            f"`{calibration.name}` gives {len(rows)} {what} {calibration.length} tokens, but {calibration.samples} "
            "were asked for; lower --samples, or use more text"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(calibration.seed))
    return order[: calibration.samples].tolist()


def padded(picked: Sequence[Sequence[int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Rows padded to the longest, [N, T] int64, and a mask of the real tokens, [N, T] bool."""
    width = max(map(len, picked))
    ids = torch.full((len(picked), width), getattr(tokenizer, "pad_token_id", 0) or 0, dtype=torch.int64)
    padding = torch.zeros((len(picked), width), dtype=torch.bool)
    for i, row in enumerate(picked):
        ids[i, : len(row)] = torch.tensor(row)
        padding[i, : len(row)] = True
    return ids, padding


def bos(tokenizer: Any) -> list[int]:
    """[BOS] where the tokenizer begins texts with it, else []."""
    start = tokenizer("a", verbose=False)["input_ids"][:1]
    return start if start and start[0] == tokenizer.bos_token_id else []


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text: [BOS] or [CLS], and [SEP] or [EOS]."""
    whole, inner = (tokenizer("a", verbose=False, add_special_tokens=say)["input_ids"] for say in (True, False))
    places = (i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner)
    place = next(places, len(bos(tokenizer)))
    return whole[:place], whole[place + len(inner) :]
