"""Calibration on text that the model generates: `self`, or `self:FILE` with prompts from a file.

Without data from its use, a model's own samples are the closest substitute (data-free quantization does the same,
arXiv 2305.17888).  Only generated tokens are scored, as with the completions of a .jsonl file.  They are cached by
weights, prompts and settings.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from dropformer.metrics.calibration.completions import has_prompts, prompt_rows
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.text import prompts_of
from dropformer.metrics.calibration.windows import Windows, frame, padded, picked, scored_windows, windows
from dropformer.prune.errors import ModelError, OutputError
from dropformer.prune.files.folder import new_files
from dropformer.prune.files.output_paths import cache_folder
from dropformer.prune.loading.quiet import quiet_transformers

PROMPT = 64  # tokens of a prompt taken from a text; at most a quarter of the window
ROWS = 32  # batch size of generation
TOP_P = 0.95


@dataclass(frozen=True)
class Writer:
    """A model that generates text; `fingerprint` identifies its weights in the cache (None: not cached)."""

    model: nn.Module
    tokenizer: Any
    fingerprint: str | None = None
    tell: Callable[[str], None] = lambda text: None


def written_windows(calibration: Calibration, writer: Writer) -> Windows:
    """Windows of prompts with the model's continuations; the prompts are not scored.

    Prompts of a .jsonl with completions or messages are used whole and answered up to the end-of-text token.  From
    any other text, random pieces of at most a quarter of the window are prompts, and the model fills the window.
    Sampled at temperature 1 with top-p 0.95, seeded.
    Time: one decoding step per token for every `ROWS` windows.  Memory: their KV cache.
    Raises ModelError for a model that does not generate.
    """
    if not getattr(writer.model, "can_generate", lambda: False)():
        raise ModelError(f"{type(writer.model).__name__} generates no text; name another --calibration than `self`")
    answers = has_prompts(prompts_of(calibration.name))
    prompts = _prompts(calibration, writer.tokenizer, answers)
    file = _file(calibration, prompts, writer)
    rows = _kept(file)
    if rows is None:
        writer.tell(f"{calibration.name}: the model writes {len(prompts)} texts of up to {calibration.length} tokens")
        rows = list(_written(prompts, calibration, writer, answers))
        _keep(file, rows)
    return _windows(calibration, writer.tokenizer, prompts, rows)


def _prompts(calibration: Calibration, tokenizer: Any, answers: bool) -> list[list[int]]:
    """Token ids of the prompts that the seed draws.  Raises CalibrationError if there are too few."""
    name = prompts_of(calibration.name)
    if answers:
        rows = [row for row in prompt_rows(name, tokenizer) if len(row) < calibration.length]
    else:
        size = max(2, min(PROMPT, calibration.length // 4))
        _, end = frame(tokenizer)
        pieces = windows(replace(calibration, name=name, length=size, skip_first=0), tokenizer).ids.tolist()
        return [row[: size - len(end)] for row in pieces]
    return [rows[i] for i in picked(rows, calibration, "prompts within")]


def _written(
    prompts: Sequence[Sequence[int]], calibration: Calibration, writer: Writer, answers: bool
) -> Iterator[list[int]]:
    """Each prompt with its continuation; batches hold prompts of equal length, so none is padded."""
    alike: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        alike[len(prompt)].append(i)
    found: dict[int, list[int]] = {}
    parts = [some[k : k + ROWS] for some in alike.values() for k in range(0, len(some), ROWS)]
    with torch.random.fork_rng(devices=_devices(writer.model)):
        torch.manual_seed(calibration.seed)
        for some in parts:
            ids = _generate(writer, torch.tensor([prompts[i] for i in some]), calibration.length, answers)
            found |= dict(zip(some, ids, strict=True))
    yield from (found[i] for i in range(len(prompts)))


class _Told(StoppingCriteria):
    """Tells at each quarter of a batch's tokens; stops nothing."""

    def __init__(self, writer: Writer, start: int, length: int) -> None:
        self.tell, self.start, self.most = writer.tell, start, length - start

    def __call__(self, input_ids: Tensor, scores: Tensor, **others: Any) -> Tensor:  # type: ignore[override]
        done = input_ids.shape[1] - self.start
        if done * 4 // self.most > (done - 1) * 4 // self.most:
            self.tell(f"self: {done} of {self.most} tokens of {len(input_ids)} texts")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _devices(model: Any) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _generate(writer: Writer, ids: Tensor, length: int, answers: bool) -> list[list[int]]:
    """Continuations of prompts [B, P] up to `length` tokens, or up to end-of-text if `answers`."""
    model: Any = writer.model
    end = writer.tokenizer.eos_token_id
    ids = ids.to(model.device)
    with torch.inference_mode(), quiet_transformers():  # warns of eos_token_id -1
        rows = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length - ids.shape[1],
            do_sample=True, temperature=1.0, top_p=TOP_P, top_k=0,
            eos_token_id=end if answers else -1,  # -1: generation never stops early
            pad_token_id=0 if end is None else end,
            stopping_criteria=StoppingCriteriaList([_Told(writer, ids.shape[1], length)]),
        )  # fmt: skip
    found = rows.tolist()
    return [_ended(row, ids.shape[1], end) for row in found] if answers else found


def _ended(row: list[int], start: int, end: int | None) -> list[int]:
    """A row up to the first end-of-text token after its prompt.  For example [5, 6, 2, 2] from 1 on: [5, 6, 2]."""
    return row[: row.index(end, start) + 1] if end in row[start:] else row


def _windows(
    calibration: Calibration, tokenizer: Any, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> Windows:
    """The rows as windows in which only generated tokens are scored."""
    ids, padding = padded(rows, tokenizer)
    counts = padding.clone()
    for i, prompt in enumerate(prompts):
        counts[i, : len(prompt)] = False
    return scored_windows(replace(calibration, packed=False), ids, padding, counts)


def _file(calibration: Calibration, prompts: Sequence[Sequence[int]], writer: Writer) -> Path | None:
    """The cache file of the rows, named by weights, dtype, prompts and settings."""
    if writer.fingerprint is None:
        return None
    dtype = next(writer.model.parameters()).dtype
    said = json.dumps([writer.fingerprint, str(dtype), calibration.length, calibration.seed, TOP_P, list(prompts)])
    return cache_folder() / "written" / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"


def _kept(file: Path | None) -> list[list[int]] | None:
    """The cached rows; None if there are none or they cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError):
        return None
    good = isinstance(found, list) and all(isinstance(row, list) and set(map(type, row)) == {int} for row in found)
    return found if good else None


def _keep(file: Path | None, rows: Sequence[Sequence[int]]) -> None:
    """Cache the rows; does nothing if the cache cannot be written."""
    if file is None:
        return
    with suppress(OSError, OutputError), new_files(file.parent) as folder:
        (folder / file.name).write_text(json.dumps(list(rows)), encoding="utf-8")
