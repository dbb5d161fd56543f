"""Prune a checkpoint by a plan without its model in memory: headers are read, the bytes that stay are copied.

    write_by_plan(plan, folder, out)

Neither torch nor transformers is imported where blocks stay in their places, or are all alike, and the files call
tensors as the model does, which the plan's own counts prove; else transformers is asked, on a model without weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dropformer.prune.block_map import Surgery, map_blocks
from dropformer.prune.errors import (
    ArchitectureError,
    DropformerError,
    ModelError,
    OutputError,
    PlanError,
    VerificationError,
)
from dropformer.prune.files import Checkpoint, new_folder, open_checkpoint
from dropformer.prune.files.config_json import read_config
from dropformer.prune.formats.fitting import check_fits
from dropformer.prune.formats.record import need_dense, write_record
from dropformer.prune.formats.registry import FORMATS
from dropformer.prune.formats.writing import Exported, ExportJob, ExportOptions
from dropformer.prune.plan import Plan
from dropformer.prune.surgery.config import pruned_config
from dropformer.prune.surgery.side_files import followed_files


def write_by_plan(
    plan: Plan, source: Path, out: Path, how: ExportOptions | None = None, repair: Any = None
) -> Exported:
    """Write the checkpoint that a plan makes of the one in `source`.

    Every tensor's bytes are compared with the source; nothing is run.  Memory: a copy's buffer, whatever the size.
    `repair` (`metrics.repair.base.Repair`) gives some of the kept layers new weights; without one, those that the
    plan was made with are not repeated.
    Raises PlanError where the plan was made for other weights or the format cannot carry it, OutputError where `out`
    exists and is not empty, CheckpointError for a bad source or a config.json that does not fit it.
    """
    how = how or ExportOptions()
    kind = FORMATS[how.format]
    if kind.runs:
        raise OutputError(f"--format {how.format} runs the model, which a plan alone does not load; add --measure")
    checkpoint = open_checkpoint(source)
    if plan.model.fingerprint != checkpoint.fingerprint:
        raise PlanError(f"the plan was made for other weights than those in {source}; plan this model")
    need_dense(read_config(source), plan.model.name)
    check_fits(plan, checkpoint, how.trust_remote_code)
    if plan.fitted and not repair:
        raise PlanError(
            "the plan has linear maps or folded sinks, whose numbers it does not hold: fit them with the model in "
            "memory, by `prune --model ... --plan ...`"
        )
    plan = plan if repair else plan.unrepaired()
    plain = None if repair else plain_writing(plan, checkpoint, how)
    writing = plain or asked_writing(plan, checkpoint, how, repair)
    kind.check_rungs(how.format, writing.block_map)
    with new_folder(out) as folder:
        copied = kind.fill(folder, writing)
        record = write_record(folder, plan, writing.block_map, copied, how.format)
        plan.portable().write(folder / "plan.json")
    return Exported(out, copied, record, None)


def plain_writing(plan: Plan, source: Checkpoint, how: ExportOptions) -> ExportJob | None:
    """What is to be written, if tensors and parameters have the same names and no block moves to where it would be
    another one; else None.

    The names are the same when the tensors that would go hold as many numbers as the plan says go.
    """
    outline = plan.outline
    block_map = map_blocks(outline, plan.layers)
    if plan.rungs or not outline.autos:
        return None
    if not (block_map.in_place(outline) or all(stack.alike for stack in outline.stacks)):
        return None
    surgery = Surgery(outline, tuple(plan.layers), block_map)
    try:
        pruned_config(read_config(source.folder), outline, block_map)
        followed_files(source.folder, outline, block_map)
    except ArchitectureError:  # transformers is asked, and blocks stay where they are
        return None
    names = {name: name for name in source.tensors}
    prefix = outline.stacks[0].path.partition(".")[0]
    writing = ExportJob(source, read_config(source.folder), surgery, names, prefix, outline.autos, how)
    removed = sum(math.prod(span.shape) for name, span in source.tensors.items() if writing.rename(name) is None)
    return writing if removed == outline.dropped_parameters(plan.layers) else None


def asked_writing(plan: Plan, source: Checkpoint, how: ExportOptions, repair: Any = None) -> ExportJob:
    """The same from a model without weights: what transformers calls the tensors, and whether blocks can move."""
    from dropformer.prune.formats.export import writing_of
    from dropformer.prune.loading.load import weightless
    from dropformer.prune.surgery.surgery import plan_surgery

    model = weightless(source.folder, how.trust_remote_code)
    mapped = repair.mapped if repair else None
    surgery = plan_surgery(plan.outline, plan.layers, model, mapped, plan.rungs, source.folder)
    if repair and (named := repair.named(plan.outline, surgery.block_map)):
        from dropformer.prune.surgery.stored_tensors import stored_dtype

        dtype = stored_dtype(source.folder)
        surgery = replace(surgery, tensors={name: tensor.to(dtype) for name, tensor in named.items()})
    return writing_of(type(model), surgery, source, how)


@contextmanager
def plan_kept(plan: Plan, out: Path, always: bool) -> Iterator[None]:
    """Inside the `with`, an error that would lose the plan leaves it beside `out`, and says how to follow it.

    `always`: for every DropformerError, as where choosing took long; else where a check failed.  Memory that ran out
    becomes a ModelError.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
        if not full and not isinstance(error, DropformerError if always else VerificationError):
            raise
        path = out.parent / f"{out.name}-plan.json"
        try:
            plan.write(path)
        except (OSError, DropformerError):
            raise error from None
        kind = ModelError if full else type(error)
        again = ", and the same --quality or --repair" if plan.repairs else ""
        said = "out of memory" if full else str(error)
        raise kind(f"{said}; the plan was kept: follow it with --plan {path}{again}") from error
