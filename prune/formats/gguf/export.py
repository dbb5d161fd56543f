"""The export format `gguf`: a pruned .gguf file, made from the dense one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dropformer.prune.errors import OutputError
from dropformer.prune.formats.registry import ExportFacts

if TYPE_CHECKING:
    from dropformer.prune.files import CopyReport
    from dropformer.prune.formats.writing import ExportJob


def check(facts: ExportFacts) -> None:
    """Raises OutputError for a model that does not come as a .gguf file."""
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
    check(ExportFacts("this model", source is not None))
    assert source is not None
    verify: Literal["all", "sample"] = "all" if job.how.thorough else "sample"
    target = folder / f"{source.stem}-{'zeros' if zeros else 'pruned'}.gguf"
    done = write_gguf(source, target, job.surgery, zeros=zeros, progress=job.how.progress, verify=verify)
    return replace(done.copied, notes=done.stand_ins)
