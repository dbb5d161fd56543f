"""scores.json: how redundant every layer is, how sure that is, and what it was measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dropformer.metrics.calibration import CalibrationRef
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import Artifact, ModelRef, Part
from dropformer.prune.errors import CalibrationError
from dropformer.prune.outline import Outline


class LayerScore(Part):
    """One layer's similarity, averaged over tokens, and its standard error over windows."""

    layer: str
    similarity: float
    stderr: float | None = None


class Scores(Artifact):
    """The similarity of every layer: cos(residual stream before, after); importance is 1 - similarity."""

    kind = "scores"
    model: ModelRef
    metric: str = "similarity"
    calibration: CalibrationRef | None = None
    windows: int
    tokens: int
    layers: list[LayerScore]
    outline: Outline

    def similarity(self) -> dict[Layer, float]:
        return {Layer.parse(score.layer): score.similarity for score in self.layers}

    def stderr(self) -> dict[Layer, float | None]:
        return {Layer.parse(score.layer): score.stderr for score in self.layers}

    def ranking(self, kind: str, stack: str = "") -> list[Layer]:
        """Layers of a kind, most redundant first; ties go to the deeper layer."""
        found = {layer: s for layer, s in self.similarity().items() if (layer.kind, layer.stack) == (kind, stack)}
        return sorted(found, key=lambda layer: (-found[layer], -layer.index))

    def matches(self, model: ModelRef, calibration: CalibrationRef) -> bool:
        """Were these measured on the same weights and the same tokens?  Only then may they be used again."""
        return bool(model.fingerprint) and (self.model.fingerprint, self.calibration) == (
            model.fingerprint,
            calibration,
        )


def summarize(layers: Sequence[Layer], sums: Tensor, tokens: Tensor) -> list[LayerScore]:
    """Scores from per-window sums [N, layers] and scored tokens per window [N], in float64.

    Similarity is the mean over all tokens; the standard error is that of the windows' means, None for
    one window.  Raises CalibrationError where a layer gave no finite number.
    """
    mean = sums.sum(0) / tokens.sum()
    bad = (~torch.isfinite(mean)).nonzero()
    if len(bad):
        raise CalibrationError(f"{layers[int(bad[0])]} has no finite similarity: the model's hidden states overflow or a "
                               "layer did not run; try --dtype float32")  # fmt: skip
    each = sums / tokens[:, None]
    error = each.std(0) / len(each) ** 0.5 if len(each) > 1 else None
    return [
        LayerScore(layer=str(layer), similarity=float(mean[i]), stderr=None if error is None else float(error[i]))
        for i, layer in enumerate(layers)
    ]


def read_scores(path: Path | str) -> Scores:
    return Scores.read(path)


def as_mapping(scores: Scores | Mapping[Layer, float]) -> Mapping[Layer, float]:
    return scores.similarity() if isinstance(scores, Scores) else scores
