"""Calibration data of a model: windows of text, or images for a model that takes only images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dropformer.metrics.calibration.generated import Writer, written_windows
from dropformer.metrics.calibration.images import PIXELS, pictures
from dropformer.metrics.calibration.settings import Calibration, CalibrationRef, context_of
from dropformer.metrics.calibration.text import writes_itself
from dropformer.metrics.calibration.windows import Windows, windows
from dropformer.prune.errors import CalibrationError, ModelError
from dropformer.prune.loading.tokenizer import why_no_tokenizer
from dropformer.prune.samples.inputs import longest_text, takes_pictures


class CalibrationData(Protocol):
    """Model inputs, one sample per row: text windows or images."""

    @property
    def ref(self) -> CalibrationRef:
        """Name, size, seed and hash, as artifacts record them."""

    def __len__(self) -> int: ...

    def lengths(self) -> list[int]:
        """Length of each sample without padding."""

    def batches(self, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """(model inputs, scored positions [B, T] bool or None for all) for `size` samples at a time, in order."""

    def batch(self, which: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        """(model inputs, scored positions) of these samples."""


def default_settings(model: Any, default: Calibration) -> Calibration:
    """Default calibration settings, clamped to the model's maximum length; random pixels for an image model."""
    if takes_pictures(model):
        return replace(default, name=PIXELS)
    limits = (longest_text(model), _context(model)) if model is not None else ()
    return replace(default, length=min([default.length, *filter(None, limits)]))


def _context(model: Any) -> int | None:
    config = getattr(model, "config", None)
    return context_of(config) if hasattr(config, "to_dict") else None


def text_windows(calibration: Calibration, writer: Writer) -> Windows:
    """Windows of a text, or of text that the model generates."""
    itself = writes_itself(calibration.name)
    return written_windows(calibration, writer) if itself else windows(calibration, writer.tokenizer)


def calibration_data(
    model: Any, tokenizer: Any, folder: Path, calibration: Calibration, fingerprint: str | None = None
) -> CalibrationData:
    """The windows or images of a calibration for a model (None: not loaded) whose files are in `folder`.

    `fingerprint` identifies the weights in the cache of generated text (None: not cached).
    Raises ModelError for a text model without a tokenizer, CalibrationError for data that the model cannot read.
    """
    if takes_pictures(model):
        return pictures(calibration, model.config, folder)
    if tokenizer is None:
        raise ModelError(
            f"{folder} {why_no_tokenizer(folder)}, so text cannot calibrate it; use dropformer.analyze(model, batches) "
            "in Python"
        )
    limit = longest_text(model) if model is not None else None
    if limit is not None and calibration.length > limit:
        raise CalibrationError(f"the model reads at most {limit} tokens, not {calibration.length}; lower --length")
    return text_windows(calibration, Writer(model, tokenizer, fingerprint))
