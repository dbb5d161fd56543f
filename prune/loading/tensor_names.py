"""From the tensor names in a checkpoint's files to the parameter names of the model.

Families rename tensors as they load; transformers knows how, and is asked rather than guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.models.auto import modeling_auto

from dropformer.prune.loading import modeling


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
