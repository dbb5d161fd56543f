"""Before and after, side by side: size, KV cache, perplexity on held-out text, speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dropformer.eval.cost.memory import kv_bytes_at, kv_bytes_per_token, parameter_count
from dropformer.eval.cost.speed import Quartiles, quick
from dropformer.eval.quality.cliff import Trend, trend
from dropformer.eval.quality.output_similarity import OutputSimilarity
from dropformer.eval.quality.perplexity import plus_minus, side_by_side
from dropformer.metrics.analysis.plots import similarity_by_depth
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.repair.base import Repair
from dropformer.prune.artifact import Artifact, FrozenRecord, ModelRef
from dropformer.prune.files import CopyReport
from dropformer.prune.formats.record import kv_width
from dropformer.prune.plan import Plan
from dropformer.prune.window import CONTEXT


class Side(FrozenRecord):
    """One model's measurements.  Bytes are the checkpoint's; speeds in tokens/s are medians over repeats.

    `kv_bytes`: the cache of one sequence of `Report.kv_context` tokens, where layers have windows.
    """

    parameters: int
    checkpoint_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int | None = None
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


class TextRef(FrozenRecord):
    """The text that perplexity was measured on; `calibrated_on`: also the calibration text, which biases the figure."""

    name: str
    windows: int
    length: int
    hash: str
    calibrated_on: bool = False


class Ratio(FrozenRecord):
    """Measured speed over the dense model's: median and quartiles over repeats, and the upper bound by work saved."""

    median: float
    low: float
    high: float
    bound: float

    @property
    def noise(self) -> bool:
        """Whether the median exceeds the upper bound."""
        return self.median > self.bound

    def __str__(self) -> str:
        said = f"{self.median:.3f}x [{self.low:.2f}, {self.high:.2f}]"
        return said + (f" noise: more than {self.bound:.2f}x" if self.noise else "")


class RepairCost(FrozenRecord):
    """Cost of selection and repair: forward passes over the calibration windows, peak bytes beyond the model."""

    passes: float
    extra_bytes: int


class SpeedRef(FrozenRecord):
    """How speed was measured: both models interleaved in one run, with the real KV cache."""

    prompt: int
    new: int
    batch: int
    device: str
    dtype: str
    decode_bound: float
    prefill_bound: float
    prefill_ratio: Ratio | None = None
    decode_ratio: Ratio | None = None


class Report(Artifact):
    """report.json: quality lost and resources saved by a drop."""

    kind = "report"
    model: ModelRef
    spec: str
    dropped: dict[str, Any]
    dense: Side
    pruned: Side
    kv_context: int | None = None
    text: TextRef | None = None
    perplexity_ratio_stderr: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    trend: Trend | None = None
    speed: SpeedRef | None = None
    outputs: OutputSimilarity | None = None
    repair: RepairCost | None = None

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.dense, self.pruned

    @property
    def context_not_read(self) -> int | None:
        """The tokens of `kv_context`, where perplexity is of shorter texts and so not what the windows cost there."""
        short = self.text and self.kv_context and self.text.length < self.kv_context
        return self.kv_context if short else None

    def ratio(self, figure: str) -> str:
        """The ratio of the pruned model's figure to the dense one's, with its spread; empty for sizes."""
        if figure == "perplexity" and self.dense.perplexity and self.pruned.perplexity:
            spread = "" if self.perplexity_ratio_stderr is None else f" ± {self.perplexity_ratio_stderr:.3f}"
            return f"{self.pruned.perplexity / self.dense.perplexity:.3f}x{spread}"
        found = {"prefill_tokens_per_s": "prefill_ratio", "decode_tokens_per_s": "decode_ratio"}.get(figure)
        return str(getattr(self.speed, found) or "") if found and self.speed else ""


def same_text(one: str, other: str) -> bool:
    """Whether two names are the same text: equal names, or paths of one file."""
    files = Path(one), Path(other)
    return one == other or (all(path.is_file() for path in files) and files[0].samefile(files[1]))


@dataclass(frozen=True)
class Measured:
    """The fields of a report that need the models to run."""

    dense: dict[str, Any]
    pruned: dict[str, Any]
    fields: dict[str, Any]


def measure_quality(
    dense: PreTrainedModel, pruned: PreTrainedModel, data: Windows, text: TextRef, plan: Plan
) -> Measured:
    """Perplexity of both and KL(dense || pruned) over windows [N, T] in one pass, and the plan's trend."""
    found = side_by_side(dense, pruned, data.ids, data.partly_scored)
    one, two = ({"perplexity": p.value, "perplexity_stderr": p.value_stderr} for p in (found.dense, found.pruned))
    kl = {"kl": found.divergence.value, "kl_stderr": found.divergence.stderr}
    ratio = {"perplexity_ratio_stderr": found.ratio_stderr}
    return Measured(one, two, {"text": text, **ratio, **kl, "trend": trend(dense, plan, data, found)})


def measure_speed(dense: nn.Module, pruned: nn.Module, seconds: float) -> Measured:
    """Prefill and decode of both, interleaved, within about `seconds`."""
    table = quick({"dense": dense, "pruned": pruned}, seconds)
    rows = [table.row(name) for name in ("dense", "pruned")]
    one, two = ({"prefill_tokens_per_s": r.prefill.median, "decode_tokens_per_s": r.decode.median} for r in rows)
    row = rows[1]
    speed = SpeedRef(
        prompt=row.setting.prompt,
        new=row.setting.new,
        batch=int(row.setting.batch),
        device=table.device,
        dtype=table.dtype,
        decode_bound=row.bound_decode,
        prefill_bound=row.bound_prefill,
        prefill_ratio=_ratio(row.prefill_ratio, row.bound_prefill),
        decode_ratio=_ratio(row.decode_ratio, row.bound_decode),
    )
    return Measured(one, two, {"speed": speed})


def _ratio(found: Quartiles, bound: float) -> Ratio:
    return Ratio(median=found.median, low=found.low, high=found.high, bound=bound)


def sizes(model: PreTrainedModel, checkpoint_bytes: int, kv_width: float, context: int | None = None) -> dict[str, int]:
    """Parameters, checkpoint bytes, and KV bytes per token (0 without generation) and at a context.

    Keys and values are counted in a real cache, at `kv_width` bytes per number (see `record.kv_width`), since the
    dtype of this run may differ from the checkpoint's.
    """
    width = kv_width / model.dtype.itemsize if hasattr(model, "generate") else 0
    found = {
        "parameters": parameter_count(model),
        "checkpoint_bytes": checkpoint_bytes,
        "kv_bytes_per_token": round(kv_bytes_per_token(model) * width) if width else 0,
    }
    return found | ({"kv_bytes": round(kv_bytes_at(model, context) * width)} if context and width else {})


def report_of(
    models: tuple[PreTrainedModel, PreTrainedModel],
    plan: Plan,
    copied: CopyReport,
    quality: Measured,
    speed: Measured,
    repair: Repair | None = None,
) -> Report:
    """The report of an export: sizes of the dense and the exported model, quality, speed and repair cost."""
    cost = RepairCost(passes=round(repair.passes, 2), extra_bytes=repair.extra_bytes) if repair else None
    width = kv_width(copied.bytes_before, plan.savings.parameters)
    context = CONTEXT if plan.windows else None
    before, after = (
        sizes(m, n, width, context) for m, n in zip(models, (copied.bytes_before, copied.bytes_after), strict=True)
    )
    return Report(
        model=plan.model,
        spec=plan.spec,
        dropped=plan.dropped(),
        dense=Side(**before, **quality.dense, **speed.dense),
        pruned=Side(**after, **quality.pruned, **speed.pruned),
        kv_context=context,
        repair=cost,
        **quality.fields,
        **speed.fields,
    )


def write_artifacts(folder: Path, report: Report, plan: Plan, scores: Scores | None) -> None:
    """Write report.json, plan.json and, if layers were scored, scores.json with its plot, without local paths."""
    report.portable().write(folder / "report.json")
    plan.portable().write(folder / "plan.json")
    if scores:
        scores = scores.portable()
        scores.write(folder / "scores.json")
        similarity_by_depth(scores, folder / "similarity.png", plan.outline.branch_layers(plan.layers))


def card_lines(report: Report) -> list[str]:
    """The measured results for the model card."""
    lines = []
    if report.text and report.dense.perplexity and report.pruned.perplexity:
        ratio = plus_minus(report.pruned.perplexity / report.dense.perplexity, report.perplexity_ratio_stderr, 3)
        lines.append(
            f"Perplexity on {report.text.windows} windows of {report.text.length} tokens of `{report.text.name}`: "
            f"{report.dense.perplexity:.2f} dense, {report.pruned.perplexity:.2f} pruned ({ratio} times)."
        )
        if context := report.context_not_read:
            lines.append(f"What the windows cost at {context:,} tokens was not measured here.")
    if report.outputs:
        lines.append(f"{str(report.outputs).capitalize()}.")
    if report.speed and report.speed.decode_ratio:
        lines.append(
            f"Decode speed over dense on {report.speed.device} ({report.speed.dtype}, batch {report.speed.batch}), "
            f"median and quartiles: {report.speed.decode_ratio}."
        )
    return lines
