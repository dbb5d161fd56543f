"""What a model is calibrated on: windows of text, or images for a model that takes nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dropformer.metrics.calibration.images import PIXELS
from dropformer.metrics.calibration.pictures import CalibrationData, pictures
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import windows
from dropformer.prune.discovery.inputs import longest_text, takes_pictures
from dropformer.prune.errors import CalibrationError, ModelError


def default_settings(model: Any, default: Calibration) -> Calibration:
    """A calibration that nobody asked for, as the model can take it.

    A model of images gets random pixels in place of text, one with learned positions no more tokens than it has.
    """
    if takes_pictures(model):
        return replace(default, name=PIXELS)
    limit = longest_text(model) if model is not None else None
    return replace(default, length=min(default.length, limit or default.length))


def calibration_data(model: Any, tokenizer: Any, folder: Path, calibration: Calibration) -> CalibrationData:
    """The windows or images of a calibration for a model (None: not loaded) whose files are in `folder`.

    Raises ModelError for a model of text without a tokenizer, CalibrationError for what it cannot take.
    """
    if takes_pictures(model):
        return pictures(calibration, model.config, folder)
    if tokenizer is None:
        raise ModelError(
            f"{folder} has no tokenizer, so text cannot calibrate it; use dropformer.analyze(model, batches) in Python"
        )
    limit = longest_text(model) if model is not None else None
    if limit is not None and calibration.length > limit:
        raise CalibrationError(f"the model reads at most {limit} tokens, not {calibration.length}; lower --length")
    return windows(calibration, tokenizer)
