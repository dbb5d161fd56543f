"""Checks that checkpoints can be compared: one architecture, one tokenization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropformer.eval.compare.alignment import Origin
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.text import documents
from dropformer.metrics.calibration.windows import Windows, bos, windows
from dropformer.prune.errors import CalibrationError, ModelError
from dropformer.prune.files.config_json import block_count
from dropformer.prune.outline import Outline

WIDTHS = (
    "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "num_experts", "num_local_experts",
)  # fmt: skip


class Comparable:
    """Collects facts of each checkpoint and raises ModelError at the first that differs."""

    def __init__(self) -> None:
        self._facts: dict[str, tuple[Any, str]] = {}  # name -> (value, label of the first checkpoint with it)

    def config(self, label: str, config: Mapping[str, Any], origin: Origin | None) -> None:
        """Check family, widths and number of blocks (of the original, for a pruned model) in config.json."""
        inner = config.get("text_config")
        text = inner if isinstance(inner, dict) else config
        family = config.get("base_model_type") or config.get("model_type")
        rewritten = origin is not None and family == "ministral"  # a Llama or Mistral with windows is written as one
        facts = {"family": None if rewritten else family}
        facts |= {name: text[name] for name in WIDTHS if isinstance(text.get(name), int)}
        counted = block_count(text)
        facts["number of blocks"] = origin[""].count if origin and "" in origin else None if origin else counted
        for name, value in facts.items():
            if value is not None:
                self._same(label, name, value)

    def outline(self, label: str, outline: Outline) -> None:
        """Check the traced stacks, by original block indices."""
        for stack in outline.stacks:
            self._same(label, f"number of blocks in {stack.path}", stack.blocks)

    def _same(self, label: str, name: str, value: Any) -> None:
        other, first = self._facts.setdefault(name, (value, label))
        if value != other:
            raise ModelError(
                f"{label} cannot be compared with {first}: its {name} is {value}, not {other}; "
                "compare checkpoints of one architecture"
            )


class SharedTokens:
    """The calibration windows that all checkpoints share, and the check that their tokenizers give the same ids."""

    def __init__(self, calibration: Calibration, label: str, tokenizer: Any) -> None:
        self.calibration, self.label, self.tokenizer = calibration, label, tokenizer
        self.windows: Windows = windows(calibration, tokenizer)
        self._known = {_form(tokenizer)}

    def check(self, label: str, tokenizer: Any) -> None:
        """Raises ModelError unless a tokenizer gives the same ids for the calibration text."""
        form = _form(tokenizer)
        if form is not None and form in self._known:
            return
        try:
            same = windows(self.calibration, tokenizer).ref == self.windows.ref
        except CalibrationError:  # a coarser tokenization may give too few windows
            same = False
        if not same:
            raise ModelError(
                f"{label} cannot be compared with {self.label}: its tokenizer gives other ids on "
                f"{self.calibration.name} ({self._difference(tokenizer)}); compare models with one tokenizer"
            )
        self._known.add(form)

    def check_vocabulary(self, label: str, rows: int) -> None:
        """Raises ModelError for a checkpoint without a tokenizer whose embedding is too small for the ids."""
        largest = int(self.windows.ids.max())
        if largest >= rows:
            raise ModelError(
                f"{label} cannot be compared with {self.label}: it has {rows} tokens and the calibration text uses "
                f"token {largest}; compare checkpoints that share one tokenizer"
            )

    def _difference(self, tokenizer: Any) -> str:
        for number, text in enumerate(documents(self.calibration.name)):
            mine, theirs = (_ids(t, text) for t in (self.tokenizer, tokenizer))
            for place, (a, b) in enumerate(zip(mine, theirs, strict=False)):
                if a != b:
                    return f"{b} instead of {a} at token {place} of text {number}"
        return f"texts begin with {bos(tokenizer)} instead of {bos(self.tokenizer)}, or the padding differs"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _form(tokenizer: Any) -> str | None:
    """A fast tokenizer's full state as text; None for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    return f"{tokenizer.bos_token_id} {tokenizer.pad_token_id} {backend.to_str()}"
