"""Write a pruned checkpoint, read it back, and keep it only if it is the model in memory."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from dropformer import __version__
from dropformer.prune import modeling
from dropformer.prune.arrange import original_blocks
from dropformer.prune.artifact import ModelRef
from dropformer.prune.card import model_card
from dropformer.prune.config import completed, pruned_config, without_heads
from dropformer.prune.errors import CheckpointError, VerificationError
from dropformer.prune.files import CopyReport, copy_checkpoint, new_folder, open_checkpoint
from dropformer.prune.inputs import of_images, sample_inputs, with_images
from dropformer.prune.load import load
from dropformer.prune.names import meta_model, numbered_heads, parameter_names, renaming
from dropformer.prune.outline import Outline
from dropformer.prune.plan import Plan
from dropformer.prune.replacing import replacements
from dropformer.prune.surgery import Surgery, config_from

CODE_FILE = "modeling_dropformer.py"
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
NOT_COPIED = {"config.json", "dropformer.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"}


@dataclass(frozen=True)
class Exported:
    """A finished checkpoint: where it is, what was copied, how far its logits are from the model in memory."""

    path: Path
    copied: CopyReport
    packed: bool
    max_difference: float


def export(
    model: PreTrainedModel,
    surgery: Surgery,
    plan: Plan,
    source: Path,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
    finish: Callable[[Path, CopyReport], list[str]] | None = None,
) -> Exported:
    """Write the checkpoint of a pruned model by copying the kept tensors' bytes from its source folder.

    `model` is the pruned model in memory.  `finish` may add files to the folder and returns lines for
    the model card.  The result is reloaded and compared with `model`: a missing or unexpected tensor or
    a different logit raises VerificationError and leaves nothing behind.  Raises OutputError where `out`
    exists and is not empty, CheckpointError for a bad source.
    """
    config = read_config(source)
    checkpoint = open_checkpoint(source)
    with new_folder(out) as folder:
        native = native_class(type(model))
        names = parameter_names(meta_model(native, config_from(config)), checkpoint.tensors)
        heads = numbered_heads(surgery.outline, surgery.arrangement, names, native.base_model_prefix)
        fields = write_config(folder, without_heads(config, surgery.outline, heads), surgery, type(model))
        rename = renaming(surgery.outline, surgery.arrangement, names, native.base_model_prefix)
        repaired = replacements(surgery, names, rename, native.base_model_prefix)
        copied = copy_checkpoint(checkpoint, folder, rename, replace=repaired, progress=progress)
        copy_side_files(source, folder)
        results = finish(folder, copied) if finish else None
        write_record(folder, plan, surgery, copied, results)
        difference = verify(folder, model, surgery.outline)
    return Exported(out, copied, fields["model_type"] != modeling.MODEL_TYPE, difference)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands.  Raises CheckpointError where it is missing, not JSON or lacks a model_type."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read as a model's config: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{folder / 'config.json'} has no model_type; expected a transformers config")
    return config


def native_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The transformers class behind a pruned one."""
    return cls.__bases__[0] if cls.__module__ == modeling.__name__ else cls


def write_config(folder: Path, config: dict[str, Any], surgery: Surgery, cls: type[PreTrainedModel]) -> dict[str, Any]:
    """config.json of the pruned model; one that no stock loader knows comes with the code that loads it."""
    if not surgery.arrangement.in_place(surgery.outline):
        config = completed(config, config_from(config).to_dict(), surgery.outline)
    fields = pruned_config(config, surgery.outline, surgery.arrangement)
    if fields["model_type"] == modeling.MODEL_TYPE:
        fields["auto_map"] = auto_map(native_class(cls))
        shutil.copyfile(modeling.__file__, folder / CODE_FILE)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return fields


def auto_map(native: type[PreTrainedModel]) -> dict[str, str]:
    """Which class of the carried code each Auto class uses under `trust_remote_code`."""
    stem = Path(CODE_FILE).stem
    autos = {
        name: f"{stem}.Pruned{name}"
        for name in vars(modeling_auto)
        if hasattr(modeling, f"Pruned{name}") and native.config_class in getattr(modeling_auto, name)._model_mapping
    }
    return {"AutoConfig": f"{stem}.DropformerConfig", **autos}


def copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation config, chat template, licence: all that goes with the weights but is not one."""
    for pattern in SIDE_FILES:
        for path in source.glob(pattern):
            if path.is_file() and path.name not in NOT_COPIED:
                shutil.copyfile(path, folder / path.name)


def write_record(
    folder: Path, plan: Plan, surgery: Surgery, copied: CopyReport, results: list[str] | None = None
) -> None:
    """dropformer.json and the model card; `results` are lines of measurements for the card."""
    record = provenance(plan, surgery, copied)
    (folder / "dropformer.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(plan, record, results), encoding="utf-8")


def provenance(plan: Plan, surgery: Surgery, copied: CopyReport) -> dict[str, Any]:
    """dropformer.json: where the checkpoint comes from and what is missing, in original indices."""
    size = copied.bytes_before / max(1, plan.savings.parameters)
    return {
        "schema": 1,
        "artifact": "dropformer",
        "dropformer": __version__,
        "model": plan.model.model_dump(),
        "spec": plan.spec,
        "dropped": plan.dropped(),
        "original_blocks": original_blocks(surgery.arrangement),
        "packed": surgery.arrangement.packed,
        "scores": {drop.layer: drop.similarity for drop in plan.drops},
        "calibration": plan.calibration,
        "repairs": plan.repairs,
        "command": " ".join(["prune", *sys.argv[1:]]) if Path(sys.argv[0]).name == "prune" else None,
        "before": {
            "parameters": plan.savings.parameters,
            "bytes": copied.bytes_before,
            "kv_bytes_per_token": round(plan.savings.kv * size),
        },
        "after": {
            "parameters": plan.savings.parameters_after,
            "bytes": copied.bytes_after,
            "kv_bytes_per_token": round(plan.savings.kv_after * size),
        },
    }


def verify(folder: Path, model: PreTrainedModel, outline: Outline) -> float:
    """Reload a checkpoint and compare its logits with the model in memory; the largest difference.

    The batch holds images where the outline has the vision tower of a vision-language model.

    Raises VerificationError when a tensor is missing or unexpected or the difference exceeds 1e-4 of
    the largest logit.
    """
    again = load(folder, dtype=model.dtype, device=model.device)
    images = any(of_images(stack.name) for stack in outline.stacks)
    inputs = with_images(model) if images else sample_inputs(model)
    with torch.inference_mode(), quiet_eval(model), quiet_eval(again):
        mine, theirs = model(**inputs)[0].float(), again(**inputs)[0].float()
    difference = float((mine - theirs).abs().max())
    if not difference <= 1e-4 * max(1.0, float(mine.abs().max())):
        raise VerificationError(
            "the written checkpoint gives other logits than the model in memory (largest difference "
            f"{difference:.3g}); nothing was kept"
        )
    return difference


@contextmanager
def quiet_eval(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def reference(name: str, source: Path, revision: str | None = None, license: str | None = None) -> ModelRef:
    """How artifacts name a model that lies in `source`."""
    checkpoint = open_checkpoint(source)
    config = read_config(source)
    return ModelRef(
        name=name,
        revision=revision,
        fingerprint=checkpoint.fingerprint,
        model_type=config["model_type"],
        license=license,
    )


def save_in_memory(model: PreTrainedModel, surgery: Surgery, plan: Plan, out: Path) -> Exported:
    """Write a pruned model that has no checkpoint on disk; otherwise as `export`."""
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        written = open_checkpoint(folder)
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not surgery.arrangement.packed:
            fields["auto_map"] = auto_map(native_class(type(model)))
            shutil.copyfile(modeling.__file__, folder / CODE_FILE)
            (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        share = plan.savings.parameters / max(1, plan.savings.parameters_after)
        report = CopyReport(len(written.tensors), 0, written.nbytes, round(written.nbytes * (share - 1)))
        write_record(folder, plan, surgery, report)
        difference = verify(folder, model, surgery.outline)
    return Exported(out, report, surgery.arrangement.packed, difference)
