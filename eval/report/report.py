"""Before and after, side by side: size, KV cache, perplexity on held-out text, speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dropformer.eval.cost.memory import kv_bytes_at, kv_bytes_per_token, parameter_count
from dropformer.eval.cost.speed import quick
from dropformer.eval.quality.cliff import Trend, trend
from dropformer.eval.quality.output_similarity import OutputSimilarity
from dropformer.eval.quality.perplexity import side_by_side
from dropformer.metrics.analysis.plots import similarity_by_depth
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.windows import Windows
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
    """The text that perplexity was measured on; `calibrated_on`: calibration saw it too, which flatters the figure."""

    name: str
    windows: int
    length: int
    hash: str
    calibrated_on: bool = False


class SpeedRef(FrozenRecord):
    """How speed was measured: both models interleaved in one run, with the real KV cache."""

    prompt: int
    new: int
    batch: int
    device: str
    dtype: str
    decode_bound: float
    prefill_bound: float


class Report(Artifact):
    """report.json: what a drop cost and what it saved."""

    kind = "report"
    model: ModelRef
    spec: str
    dropped: dict[str, Any]
    dense: Side
    pruned: Side
    kv_context: int | None = None
    text: TextRef | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    trend: Trend | None = None
    speed: SpeedRef | None = None
    outputs: OutputSimilarity | None = None


def same_text(one: str, other: str) -> bool:
    """Whether two names are of one text: the same name, or paths that lead to one file."""
    files = Path(one), Path(other)
    return one == other or (all(path.is_file() for path in files) and files[0].samefile(files[1]))


@dataclass(frozen=True)
class Measured:
    """The fields of a report that need the models running."""

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
    return Measured(one, two, {"text": text, **kl, "trend": trend(dense, plan, data, found)})


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
    )
    return Measured(one, two, {"speed": speed})


def sizes(model: PreTrainedModel, checkpoint_bytes: int, kv_width: float, context: int | None = None) -> dict[str, int]:
    """Parameters, checkpoint bytes, and KV bytes per token (0 where nothing is written), and at a context.

    Keys and values are counted in a real cache and stated at `kv_width` bytes a number, as `record.kv_width` gives
    it: what a model computes in here says nothing about the checkpoint.
    """
    width = kv_width / model.dtype.itemsize if hasattr(model, "generate") else 0
    found = {
        "parameters": parameter_count(model),
        "checkpoint_bytes": checkpoint_bytes,
        "kv_bytes_per_token": round(kv_bytes_per_token(model) * width) if width else 0,
    }
    return found | ({"kv_bytes": round(kv_bytes_at(model, context) * width)} if context and width else {})


def report_of(
    models: tuple[PreTrainedModel, PreTrainedModel], plan: Plan, copied: CopyReport, quality: Measured, speed: Measured
) -> Report:
    """The report of an export: sizes of the dense model and of the one that was written, and what was measured."""
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
        **quality.fields,
        **speed.fields,
    )


def write_artifacts(folder: Path, report: Report, plan: Plan, scores: Scores | None) -> None:
    """report.json, plan.json and, where layers were scored, scores.json with its picture, for other machines too."""
    report.portable().write(folder / "report.json")
    plan.portable().write(folder / "plan.json")
    if scores:
        scores = scores.portable()
        scores.write(folder / "scores.json")
        similarity_by_depth(scores, folder / "similarity.png", plan.outline.branch_layers(plan.layers))


def card_lines(report: Report) -> list[str]:
    """The measured results as the model card states them."""
    lines = []
    if report.text and report.dense.perplexity and report.pruned.perplexity:
        ratio = report.pruned.perplexity / report.dense.perplexity
        lines.append(
            f"Perplexity on {report.text.windows} windows of {report.text.length} tokens of `{report.text.name}`: "
            f"{report.dense.perplexity:.2f} dense, {report.pruned.perplexity:.2f} pruned ({ratio:.3f} times)."
        )
    if report.outputs:
        lines.append(f"{str(report.outputs).capitalize()}.")
    if report.speed and report.dense.decode_tokens_per_s and report.pruned.decode_tokens_per_s:
        ratio = report.pruned.decode_tokens_per_s / report.dense.decode_tokens_per_s
        lines.append(
            f"Decode speed on {report.speed.device} ({report.speed.dtype}, batch {report.speed.batch}): "
            f"{ratio:.2f} times dense."
        )
    return lines
