"""Model types that only the code beside a checkpoint knows: registered with transformers' Auto classes, once trusted.

A pruned checkpoint of such a model carries that code, and its config.json says

    "model_type": "dropformer_remote",
    "base_model_type": "theirs",
    "base_auto_map": {"AutoConfig": "configuration_theirs.TheirConfig",
                      "AutoModelForCausalLM": "modeling_theirs.TheirForCausalLM"}

The type is registered nowhere, so that transformers asks for `trust_remote_code` before any of the code runs.
Self-contained, as `modeling.py` is, and copied beside checkpoints with it.
"""

from __future__ import annotations

import inspect
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

REMOTE_TYPE = "dropformer_remote"
HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "code_revision")


def needs_own_code(fields: dict[str, Any]) -> bool:
    """Is a config.json, pruned or dense, of a type that transformers itself does not know, with code that does?"""
    return fields.get("base_model_type", fields["model_type"]) not in CONFIG_MAPPING_NAMES and "AutoConfig" in code_of(
        fields
    )


def code_of(fields: dict[str, Any]) -> dict[str, str]:
    """Auto class -> class in the dense model's own code, as config.json names them."""
    named = fields.get("base_auto_map" if "base_model_type" in fields else "auto_map")
    named = named if isinstance(named, dict) else {}
    return {auto: ref for auto, ref in named.items() if auto.startswith(("AutoConfig", "AutoModel")) and ref}


def learn_own_code(fields: dict[str, Any], path: Any, **hub: Any) -> None:
    """Run the code that a config.json names and register its classes.  Only for code that the user trusts."""
    found = {auto: get_class_from_dynamic_module(ref, str(path), **hub) for auto, ref in code_of(fields).items()}
    config = found.pop("AutoConfig")
    CONFIG_MAPPING.register(fields.get("base_model_type", fields["model_type"]), config, exist_ok=True)
    for auto, model in found.items():
        model.config_class = config  # type: ignore[attr-defined]
        getattr(modeling_auto, auto).register(config, model, exist_ok=True)


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s options that locate files on the Hub."""
    return {key: kwargs[key] for key in HUB if kwargs.get(key) is not None}


def copy_own_code(base: type, folder: Path) -> None:
    """Copy the files of a base config class and of its models beside a checkpoint, with what they import."""
    models = [getattr(auto, "_model_mapping", None) for auto in vars(modeling_auto).values() if isinstance(auto, type)]
    kinds = [base, *(mapping[base] for mapping in models if mapping is not None and base in mapping)]
    for file in {inspect.getfile(kind) for kind in kinds}:
        for source in [file, *get_relative_import_files(file)]:
            with suppress(shutil.SameFileError):
                shutil.copyfile(source, folder / Path(source).name)
