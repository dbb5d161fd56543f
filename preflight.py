"""What can be checked before anything heavy is imported, so that a wrong argument is answered at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.images import PIXELS, image_files
from dropformer.metrics.calibration.text import check_name
from dropformer.prune.errors import CalibrationError, OutputError, PlanError
from dropformer.prune.files import open_checkpoint
from dropformer.prune.files.config_json import read_config
from dropformer.prune.files.output_paths import check_place
from dropformer.prune.formats.onnx import check_installed
from dropformer.prune.formats.record import need_dense
from dropformer.prune.formats.registry import known_format
from dropformer.prune.loading.deci_families import check_family
from dropformer.prune.plan import Plan
from dropformer.prune.spec import check_drop, check_keep, check_stacks, parse_spec
from dropformer.recipes.source import is_gguf, locate, short_name

UNEVEN = ("hybrid_override_pattern", "layers_block_type")  # configs of models whose blocks hold one branch each


@dataclass(frozen=True)
class Job:
    """The main job, as far as names and files can tell what is wrong with it.

    `judged` are the texts of the report and the gate; `out` is None where nothing is written; `on_files`: a plan is
    followed without a model in memory.
    """

    model: str
    drop: str | None = None
    plan: Path | None = None
    scores: Path | None = None
    calibration: Sequence[str] = ()
    judged: Sequence[str] = ()
    keep: Sequence[int] = ()
    out: Path | None = None
    format: str = "dropformer"
    repair: Collection[str] = ()
    on_files: bool = False


def check_job(job: Job) -> None:
    """Raise the error that the main job would end in, as far as its files alone can tell."""
    kinds = _kinds(job)
    _check_format(job, kinds)
    for text in job.judged:
        check_name(text)
    if job.scores:
        Scores.read(job.scores)
    if job.out:
        check_out(job.out)
    folder = check(job.model, job.drop, job.calibration, dense=True)
    if job.format == "gguf" and not is_gguf(job.model):
        raise OutputError(
            f"--format gguf cuts a .gguf file, and {job.model} is none; give the .gguf of the dense model as --model "
            "(llama.cpp's convert_hf_to_gguf.py makes it)"
        )
    if folder:
        config = read_config(folder)
        check_keep(job.keep, job.drop, config)
        if job.format == "deci" and not _may_pack(kinds) and not any(key in config for key in UNEVEN):
            check_family(config)


def check(model: str, drop: str | None = None, texts: Sequence[str] = (), dense: bool = False) -> Path | None:
    """Raise the error that the arguments would end in, as far as their files alone can tell; the model's folder.

    `dense`: layers are to be dropped, which a checkpoint that is pruned already does not take.  The folder is None
    for a model that must be fetched or converted first.
    """
    if drop is not None:
        parse_spec(drop)
    for name in texts:
        if Path(name).is_dir():
            image_files(name)
        elif name != PIXELS:
            check_name(name)
    folder = locate(model)
    if folder:
        tensors = open_checkpoint(folder).tensors
        if dense:
            need_dense(read_config(folder), model)
        check_stacks(drop, tensors, model)
        check_drop(drop, read_config(folder), model)
    return folder


def texts(calibration: str | None, several: bool = False) -> tuple[str, ...]:
    """The calibration texts that were named by commas, none by None.  Raises CalibrationError.

    `several`: windows can be shared out among texts, as they are where a search or a repair measures its own.
    """
    if calibration is None:
        return ()
    whole = not several and Path(calibration).exists()  # a name may hold a comma
    names = tuple(name.strip() for name in ([calibration] if whole else calibration.split(",")) if name.strip())
    if not names:
        raise CalibrationError("--calibration names no text; expected builtin, c4, wikitext or a file, or leave it out")
    if len(names) > 1 and not several:
        raise CalibrationError(
            f"--calibration `{calibration}` names several texts, which need `prune` with --quality or --repair; "
            "name one"
        )
    return names


def check_out(out: Path) -> None:
    """Raises OutputError where a checkpoint could not be written."""
    check_place(out)
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} exists and is not an empty folder; choose another --out or remove it")


def default_out(model: str, drop: str | None, plan: Path | None) -> Path:
    """./MODEL-SPEC, as in llama-2-13b-attn16."""
    spec = drop if drop else (plan.stem if plan else "pruned")
    short = "".join(c if c.isalnum() or c in ".=-" else "-" if c == "," else "" for c in spec.replace("%", "pct"))
    return Path(f"{short_name(model)}-{short}")


def _kinds(job: Job) -> set[str] | None:
    """The kinds of layers that go; None where a budget chooses.  Raises PlanError, or what reading a plan raises."""
    if job.plan:
        return {layer.kind for layer in Plan.read(job.plan).layers}
    return {kind for s in parse_spec(job.drop) for kind in s.kinds} if job.drop is not None else None


def _may_pack(kinds: set[str] | None) -> bool:
    """Whether what is left may pair up as a stock, shorter model, as it cannot without attention layers alone."""
    return kinds is None or "block" in kinds or {"attn", "mlp"} <= kinds


def _check_format(job: Job, kinds: set[str] | None) -> None:
    """Raises OutputError or PlanError for a format that cannot be written here, or not of this job."""
    form = known_format(job.format)
    if job.format == "onnx":
        check_installed()
    if form.runs and job.on_files:
        raise OutputError(f"--format {job.format} runs the model, which a plan alone does not load; add --measure")
    if job.format in ("deci", "dense") and "linear" in job.repair and (kinds is None or "attn" in kinds):
        raise PlanError(
            f"--format {job.format} has no place for linear maps; repair another way than --repair linear or "
            "--quality linear, or leave out --format"
        )
