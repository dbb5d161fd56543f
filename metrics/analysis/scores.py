"""scores.json: how redundant every layer is, how sure that is, and what it was measured on."""

from __future__ import annotations

from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import Artifact, FrozenRecord, ModelRef
from dropformer.prune.outline import Outline


class LayerScore(FrozenRecord):
    """One layer's similarity, averaged over tokens, and its standard error over windows."""

    layer: str
    similarity: float
    stderr: float | None = None


class Settled(FrozenRecord):
    """Why an analysis stopped before its last window: the set that `spec` drops no longer changed.

    `agreement` is the share of bootstrap resamples of the windows that choose the very same layers.
    """

    spec: str
    windows: int
    samples: int
    tokens: int
    agreement: float

    def __str__(self) -> str:
        return (
            f"{self.spec} is settled after {self.windows} of {self.samples} windows ({self.tokens:,} tokens): the same "
            f"layers in {self.agreement:.1%} of the bootstrap resamples"
        )


class Scores(Artifact):
    """The similarity of every layer: cos(residual stream before, after); importance is 1 - similarity."""

    kind = "scores"
    model: ModelRef
    metric: str = "similarity"
    calibration: CalibrationRef | None = None
    windows: int
    tokens: int
    settled: Settled | None = None
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
        """Were these measured on the same weights and on all of the same tokens?  Only then may they be used again."""
        return (
            bool(model.fingerprint)
            and self.settled is None
            and (self.model.fingerprint, self.calibration) == (model.fingerprint, calibration)
        )
