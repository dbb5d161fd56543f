"""Where measured scores are kept, so that the same weights on the same tokens are measured once."""

from __future__ import annotations

from pathlib import Path

from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.prune.files.output_paths import cache_folder


def score_file(fingerprint: str, calibration: CalibrationRef, dtype: str) -> Path:
    """The file for the scores of these weights on these tokens, computed in a dtype."""
    suffix = "" if dtype == "float32" else f"-{dtype}"
    return cache_folder() / "scores" / f"{fingerprint[:16]}-{calibration.hash[:16]}{suffix}.json"
