"""Write a pruned checkpoint, read it back, and keep it only if it is the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dropformer.prune.artifact import ModelRef
from dropformer.prune.block_map import Surgery, new_name
from dropformer.prune.files import Checkpoint, CopyReport, new_folder, open_checkpoint
from dropformer.prune.files.config_json import read_config
from dropformer.prune.formats.fitting import config_digest
from dropformer.prune.formats.record import licence_of, write_record
from dropformer.prune.formats.registry import FORMATS
from dropformer.prune.formats.verify import verify
from dropformer.prune.formats.writing import Exported, ExportJob, ExportOptions, write_config
from dropformer.prune.loading.described import (
    auto_names,
    config_from,
    meta_model,
    native_class,
    parameter_names,
    renamed_on_load,
)
from dropformer.prune.plan import Plan
from dropformer.prune.surgery.config import completed

Finish = Callable[[Path, CopyReport], list[str]]


def export(
    model: PreTrainedModel, surgery: Surgery, plan: Plan, source: Path, out: Path, how: ExportOptions | None = None,
    finish: Finish | None = None,
) -> Exported:  # fmt: skip
    """Write the checkpoint of a pruned model by copying the kept tensors' bytes from its source folder.

    `model` is the pruned model in memory.  `finish` may add files to the folder and returns lines for the model card.
    The result is read back block by block and compared with `model` (`verify`): a missing or different tensor or
    logit raises VerificationError and leaves nothing behind.  Raises OutputError where `out`
    exists and is not empty, CheckpointError for a bad source, PlanError for what the format cannot carry.
    """
    how = how or ExportOptions()
    kind = FORMATS[how.format]
    kind.check_rungs(how.format, surgery.block_map)
    writing = replace(writing_of(native_class(type(model)), surgery, open_checkpoint(source), how), model=model)
    with new_folder(out) as folder:
        copied = kind.fill(folder, writing)
        results = finish(folder, copied) if finish else None
        record = write_record(folder, plan, surgery.block_map, copied, how.format, results)
        difference = verify(folder, model, surgery, not kind.saves) if kind.reloads else None
    return Exported(out, copied, record, difference)


def writing_of(native: type[PreTrainedModel], surgery: Surgery, source: Checkpoint, how: ExportOptions) -> ExportJob:
    """What is to be written for a surgery on a model of a native class, as transformers names its parameters."""
    config = read_config(source.folder)
    known = config_from(config)
    if not surgery.block_map.in_place(surgery.outline):
        config = completed(config, known.to_dict(), surgery.outline)
    model = meta_model(native, known)
    names = parameter_names(model, source.tensors)
    writing = ExportJob(source, config, surgery, names, native.base_model_prefix, auto_names(native), how)
    return replace(writing, parts=_parts(writing, model)) if surgery.tensors else writing


def _parts(writing: ExportJob, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """`ExportJob.parts`.  Raises CheckpointError where transformers cannot split a repaired parameter."""
    from dropformer.prune.surgery.stored_tensors import split_parameter

    rename, changed = renamed_on_load(model), writing.surgery.tensors
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for tensor in (name for name in writing.names if rename(name)[1] is not None):
        for candidate in writing.parameters(tensor):
            new = new_name(writing.outline, writing.block_map, candidate)
            if new is not None and new in changed:
                shapes = found.setdefault(new, (writing.names[tensor], {}))[1]
                shapes[tensor] = writing.source.tensors[tensor].shape
    return {new: split_parameter(model, name, changed[new], shapes) for new, (name, shapes) in found.items()}


def reference(
    name: str, source: Path, revision: str | None = None, license: str | None = None, hub: str | None = None
) -> ModelRef:
    """How artifacts name a model that lies in `source`; its licence is the one given, else the one it states."""
    checkpoint = open_checkpoint(source)
    config = read_config(source)
    return ModelRef(
        name=name,
        hub=hub,
        revision=revision,
        fingerprint=checkpoint.fingerprint,
        config=config_digest(config),
        model_type=config["model_type"],
        license=license or licence_of(source),
    )


def save_in_memory(model: PreTrainedModel, surgery: Surgery, plan: Plan, out: Path) -> Exported:
    """Write a pruned model that has no checkpoint on disk, in the default format; otherwise as `export`."""
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        written = open_checkpoint(folder)
        if not surgery.block_map.packed:
            fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            write_config(folder, fields, surgery.outline.autos)
        share = plan.savings.parameters / max(1, plan.savings.parameters_after)
        report = CopyReport(len(written.tensors), 0, written.nbytes, round(written.nbytes * (share - 1)))
        record = write_record(folder, plan, surgery.block_map, report)
        difference = verify(folder, model, surgery)
    return Exported(out, report, record, difference)
