"""What a config.json describes: its config object, the weights it asks for, and their names in files and model.

Families rename tensors as they load; transformers knows how, and is asked rather than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, __version__
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.models.auto import modeling_auto

from dropformer.prune.errors import CheckpointError, shown
from dropformer.prune.files.config_json import PREDICTING
from dropformer.prune.files.side_files import MERGE
from dropformer.prune.loading import modeling
from dropformer.prune.loading.modeling import DropformerConfig, DropformerRemoteConfig
from dropformer.prune.loading.parts import text_config


def config_from(fields: dict[str, Any]) -> PreTrainedConfig:
    """The config object that a config.json describes, pruned or stock.

    Raises CheckpointError for a model_type that only a checkpoint's own code knows.
    """
    from transformers import CONFIG_MAPPING

    fields = PreTrainedConfig._decode_special_floats(fields)  # JSON has no infinity; transformers writes it as a tag
    kind = fields.get("base_model_type") or fields["model_type"]
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"model_type {shown(kind)} is known to a checkpoint's own code and not to transformers {__version__}; "
            "read that code, then allow it by --trust-remote-code"
        )
    for own in (DropformerConfig, DropformerRemoteConfig):
        if fields["model_type"] == own.model_type:
            return own.from_dict(fields)
    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)


def predicting_blocks(config: Any) -> range:
    """The numbers of the blocks of multi-token prediction, which count on from a decoder's last one (DeepSeek V3).

    transformers builds none of them, and leaves their tensors out for some families and depths only.
    """
    text = text_config(config)
    blocks, fields = getattr(text, "num_hidden_layers", None), [getattr(text, name, None) for name in PREDICTING]
    depth = max((depth for depth in fields if type(depth) is int), default=0)
    return range(blocks, blocks + depth) if type(blocks) is int else range(0)


ADAPTED = ("lora_", ".base_layer.", "base_model.model.")  # in names of weights that PEFT saved with its adapter


def check_whole(path: Path, info: dict[str, Any], beyond: range = range(0)) -> None:
    """Raises CheckpointError for transformers' loading info that names missing, unexpected or misfit tensors.

    `beyond`: numbers of blocks whose tensors no model uses.
    """
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(_named(item) for item in info.get(problem) or [])
        if problem == "unexpected_keys":
            numbers = {name: re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in found}
            found = [name for name, match in numbers.items() if not (match and int(match[1]) in beyond)]
        if found:
            if any(part in str(name) for part in ADAPTED for name in info.get("unexpected_keys") or []):
                raise CheckpointError(f"{path}: its weights were saved with an adapter among them; {MERGE}")
            what = problem.replace("_", " ")
            raise CheckpointError(
                f"{path} does not hold the model its config describes: {len(found)} {what}, the first {found[0]}; "
                "config.json and weights of one model are needed, whole"
            )


def _named(item: Any) -> str:
    """A tensor of transformers' loading info, with the shapes of one that does not fit."""
    if isinstance(item, (tuple, list)) and len(item) == 3:
        name, held, described = item
        return f"{name} of {list(held)}, described as {list(described)}"
    return str(item)


def meta_model(native: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this class without weights, to ask it about names."""
    with torch.device("meta"):
        return native(config)


def parameter_names(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """Tensor name in the files -> parameter name in the model (the tensor's own name where none is known)."""
    rename = renamed_on_load(model)
    return {name: rename(name)[0] for name in tensors}


def renamed_on_load(model: PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """How transformers renames a tensor as it loads: the parameter's name, and the pattern of the conversion
    that makes the parameter from it and others (None where the tensor is the parameter)."""
    transforms: list[Any] = list(get_model_conversion_mapping(model))
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    state = model.state_dict()
    return lambda name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)


def native_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The transformers class behind a pruned one."""
    return cls.__bases__[0] if cls.__module__ == modeling.__name__ else cls


def auto_names(native: type[PreTrainedModel]) -> list[str]:
    """The names of transformers' Auto classes that load models with this class's config, with one head or another.

    A mapping is only asked for a key: its length or its items would import the code of every family.
    """
    autos = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    mappings = {name: getattr(auto, "_model_mapping", None) for name, auto in autos.items()}
    return [name for name, mapping in mappings.items() if mapping is not None and native.config_class in mapping]


def runs_own_code(model: PreTrainedModel) -> bool:
    """Does a model run code that came with its checkpoint, which somebody trusted?"""
    return native_class(type(model)).__module__.startswith("transformers_modules.")
