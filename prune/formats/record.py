"""The files beside the weights of a pruned checkpoint: dropformer.json and the model card."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from dropformer.prune.artifact import without_paths
from dropformer.prune.block_map import BlockMap, original_blocks, whole
from dropformer.prune.errors import PlanError
from dropformer.prune.files import CopyReport
from dropformer.prune.files.config_json import CONFIG, auto_class_name, read_config
from dropformer.prune.formats.card import model_card
from dropformer.prune.formats.registry import FORMATS
from dropformer.prune.formats.writing import MODEL_TYPE, REMOTE_TYPE
from dropformer.prune.loading.deci.families import DECI, FOREIGN, is_own_deci
from dropformer.prune.plan import Plan
from dropformer.prune.version import __version__
from dropformer.prune.window import CONTEXT, KV_AT

RECORD = "dropformer.json"
PRUNED = (MODEL_TYPE, REMOTE_TYPE, DECI)  # the model types that checkpoints with missing layers bear


def need_dense(config: dict[str, Any], name: str) -> None:
    """Raises PlanError for the config of a checkpoint that lacks layers already: indices are the dense model's."""
    if config["model_type"] == DECI and not is_own_deci(config):
        if "auto_map" not in config:
            raise PlanError(f"{name} {FOREIGN}, and config.json names none; get the whole repository")
        return
    if config["model_type"] in PRUNED:
        raise PlanError(
            f"{name} is pruned already; prune the dense model that it was made from, and name all layers in one --drop"
        )


def write_record(
    folder: Path,
    plan: Plan,
    block_map: BlockMap,
    copied: CopyReport,
    format: str = "dropformer",
    results: list[str] | None = None,
) -> dict[str, Any]:
    """dropformer.json, which is returned, and the model card; `results` are lines of measurements for the card."""
    record = provenance(plan, block_map, copied, format)
    config = read_config(folder) if (folder / CONFIG).exists() else {}
    record["stock_windows"] = bool(plan.windows) and config["model_type"] not in PRUNED
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    loading = FORMATS[format].loading(block_map.packed, bool(record["notes"]), record["stock_windows"])
    if architecture := (config.get("architectures") or [""])[0]:
        loading = loading.replace("AutoModelForCausalLM", auto_class_name(architecture, plan.outline.autos))
    (folder / "README.md").write_text(model_card(plan, record, loading, results), encoding="utf-8")
    return record


def provenance(plan: Plan, block_map: BlockMap, copied: CopyReport, format: str) -> dict[str, Any]:
    """dropformer.json: where the checkpoint comes from and what is missing, in original indices."""
    saved, saves = plan.savings, FORMATS[format].saves
    width = kv_width(copied.bytes_before, saved.parameters)
    before = _sizes(saved.parameters, copied.bytes_before, saved.kv * width)
    after = _sizes(saved.parameters_after, copied.bytes_after, saved.kv_after * width)
    if plan.windows:
        cached = plan.outline.kv_at(CONTEXT) * width
        before |= {KV_AT: round(cached)}
        after |= {KV_AT: round(cached * plan.kv_share(CONTEXT))}
    record = {
        "schema": 1,
        "artifact": "dropformer",
        "dropformer": __version__,
        "format": format,
        "model": plan.model.model_dump(),
        "spec": plan.spec,
        "dropped": plan.dropped(),
        "maps": [str(layer) for layer in sorted(block_map.mapped)],
        "windows": plan.windows,
        "agents": plan.agents,
        "original_blocks": original_blocks(block_map if saves else whole(plan.outline)),
        "packed": block_map.packed and saves,
        "scores": {drop.layer: drop.similarity for drop in plan.drops},
        "calibration": plan.calibration,
        "repairs": plan.repairs,
        "notes": list(copied.notes),
        "command": shlex.join(["prune", *map(_shared, sys.argv[1:])]) if _from_command_line() else None,
        "before": before,
        "after": after if saves else before,
    }
    return without_paths(record)


def _from_command_line() -> bool:
    return Path(sys.argv[0]).name in ("prune", "__main__.py")


def _shared(argument: str) -> str:
    """An argument of the command without folders of this machine: --out=/home/me/x becomes --out=x."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("--"):
        return f"{option}={without_paths(value)}"
    return without_paths(argument)


def kv_width(nbytes: int, parameters: int) -> float:
    """Bytes of one number in the KV cache of a checkpoint: those of its own type, but never fewer than 16 bits."""
    return max(2.0, nbytes / max(1, parameters))


def _sizes(parameters: int, nbytes: int, kv: float) -> dict[str, int]:
    return {"parameters": parameters, "bytes": nbytes, "kv_bytes_per_token": round(kv)}


def licence_of(folder: Path) -> str | None:
    """The licence that a model card in the folder states in its metadata, so that it is carried over."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
        licence = yaml.safe_load(head)["license"]
    except (OSError, ValueError, IndexError, KeyError, TypeError, yaml.YAMLError):
        return None
    return licence if isinstance(licence, str) else None
