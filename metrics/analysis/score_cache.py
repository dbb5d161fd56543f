"""Where measured scores are kept, so that the same weights on the same tokens are measured once."""

from __future__ import annotations

from pathlib import Path

from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.prune.errors import DropformerError, OutputError
from dropformer.prune.files.output_paths import cache_folder


def kept_scores(path: Path) -> Scores | None:
    """What an earlier run kept there; None where nothing is, or nothing that this version can read."""
    try:
        return Scores.read(path)
    except (DropformerError, OSError):
        return None


def keep(scores: Scores, path: Path) -> str | None:
    """Keep scores for a later run.  A cache that cannot be written is done without: what to say about it, else None."""
    try:
        scores.write(path)
    except (OutputError, OSError) as error:
        return (
            f"warning: the scores are not kept for another run: {error}; DROPFORMER_CACHE=FOLDER keeps them in another "
            "folder"
        )
    return None


def score_file(fingerprint: str, calibration: CalibrationRef, dtype: str) -> Path:
    """The file for the scores of these weights on these tokens, computed in a dtype."""
    suffix = "" if dtype == "float32" else f"-{dtype}"
    return cache_folder() / "scores" / f"{fingerprint[:16]}-{calibration.hash[:16]}{suffix}.json"
