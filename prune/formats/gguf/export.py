"""The export format `gguf`: a pruned .gguf file, made from the dense one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dropformer.prune.errors import OutputError, PlanError
from dropformer.prune.formats.registry import ExportFacts

if TYPE_CHECKING:
    from dropformer.prune.files import CopyReport
    from dropformer.prune.formats.writing import ExportJob


def check(facts: ExportFacts) -> None:
    """Raises OutputError for a model that is no .gguf file, CheckpointError for one that cannot lose these layers."""
    from dropformer.prune.formats.gguf.early import check_file  # imports NumPy

    _check_source(facts)
    check_file(facts)


def check_zeros(facts: ExportFacts) -> None:
    """The same for `--dense`.  Raises PlanError for repairs, which it does not write."""
    from dropformer.prune.formats.gguf.zeros import NO_REPAIRS

    _check_source(facts)
    if facts.repairs:
        raise PlanError(NO_REPAIRS)


def _check_source(facts: ExportFacts) -> None:
    if not facts.gguf:
        raise OutputError(
            f"--format gguf cuts a .gguf file, and {facts.model} is none; give the .gguf of the dense model as --model "
            "(llama.cpp's convert_hf_to_gguf.py makes it)"
        )


def write(job: ExportJob, folder: Path) -> CopyReport:
    """Write NAME-pruned.gguf.  Raises OutputError where the model did not come as a .gguf file."""
    return _written(job, folder, zeros=False)


def write_zeros(job: ExportJob, folder: Path) -> CopyReport:
    """Write NAME-zeros.gguf, the dense file with dropped layers as zeros.  Raises as `write`."""
    return _written(job, folder, zeros=True)


def _written(job: ExportJob, folder: Path, zeros: bool) -> CopyReport:
    from dropformer.prune.formats.gguf.write import write_gguf

    source = job.how.gguf
    _check_source(ExportFacts("this model", source is not None))
    assert source is not None
    verify: Literal["all", "sample"] = "all" if job.how.thorough else "sample"
    target = folder / f"{source.stem}-{'zeros' if zeros else 'pruned'}.gguf"
    done = write_gguf(source, target, job.surgery, zeros=zeros, progress=job.how.progress, verify=verify)
    return replace(done.copied, notes=done.stand_ins)
