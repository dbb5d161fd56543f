"""The results of an evaluation, as stored in report.json."""

from __future__ import annotations

from typing import Any, ClassVar

from dropformer.eval.quality.cliff import Trend
from dropformer.eval.tasks.paired import Paired
from dropformer.eval.tasks.results import TaskResults
from dropformer.prune.artifact import Artifact, FrozenRecord


class ModelResult(FrozenRecord):
    """One model's measurements; `paired` compares it with the dense model per question.

    drops: the layers dropped from the dense model, if known.
    """

    name: str
    drops: list[str] = []
    parameters: int
    parameter_bytes: int
    kv_bytes_per_token: int
    tasks: TaskResults | None = None
    paired: dict[str, Paired] = {}
    perplexity: dict[str, Any] | None = None
    kl: dict[str, Any] | None = None
    trend: Trend | None = None
    probes: list[dict[str, Any]] = []
    speed: list[dict[str, Any]] = []
    stream: dict[str, Any] | None = None
    long: dict[str, Any] | None = None


class Evaluation(Artifact):
    """report.json of an evaluation: the dense model first, then the pruned ones."""

    kind: ClassVar[str] = "evaluation"

    text: dict[str, Any] | None = None
    device: str | None = None
    models: list[ModelResult]
    warnings: list[str] = []
