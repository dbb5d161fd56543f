"""A pruned Transformer as a subclass of its native transformers classes.

This file is self-contained (torch and transformers only): dropformer registers it with transformers'
Auto classes, and every exported checkpoint carries a copy, so that `trust_remote_code=True` loads the
same model where dropformer is not installed.  Nothing here knows any model family.

The checkpoint's config.json says what is missing:

    "model_type": "dropformer",
    "base_model_type": "llama",
    "per_layer_config": {"12": {"skip": ["attention"]}},
    "dropformer_modules": {"model.layers.12.self_attn": ["zeros", null],
                           "model.layers.12.input_layernorm": "input"}

Each named module is replaced by `Skipped`, which has no weights and computes nothing; an attention layer may
become `LinearReplacement` instead, {"linear": [576, 576], "of": ["zeros", null]}, whose weight and bias are in
the files, or keep its module and weights and see a window, {"window": [1024, 4]}: the last 1,024 tokens and the
first 4, {"window": [1024, 0], "fold": true}: constants in the files in place of those (`window_attention.py`), or
attend through 49 averaged queries, {"agents": 49} (`agent_attention.py`).  The cache entry of a block without
attention holds nothing, so lengths and masks come from blocks that do attend.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError as error:  # no torch, as beside mlx-lm: a ValueError, after which AutoTokenizer goes on by itself
    raise ValueError(f"transformers builds a pruned model with torch, which is missing: {error}") from error
from transformers.models.auto import modeling_auto

from .own_code import REMOTE_TYPE, copy_own_code, hub_options, learn_own_code
from .skipped_modules import Skipped, skip_modules
from .window_attention import prepare_windows

MODEL_TYPE = "dropformer"
OWN = ("model_type", "per_layer_config", "model_file")  # fields of config.json that are not the base config's
CODE_FILE = "modeling_dropformer.py"  # what a copy of this file is called beside a checkpoint's weights
MLX_FILE = "mlx_dropformer.py"  # what mlx-lm runs
# what it imports
COMPANIONS = ("own_code.py", "skipped_modules.py", "window_attention.py", "window_cache.py", "agent_attention.py")

Make = TypeVar("Make", bound=Callable[..., Any])


def once(make: Make) -> Make:
    """`functools.cache` with the signature of the function: one class for each class that it is given."""
    return cast(Make, cache(make))


class DropformerConfig(PreTrainedConfig):
    """The config of `model_type: dropformer`; reading one gives a config of the base family's own class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "base_model_type" not in config_dict:
            raise ValueError("config.json has model_type dropformer but no base_model_type: not a pruned checkpoint")
        base = CONFIG_MAPPING[config_dict["base_model_type"]]
        layers = config_dict.get("per_layer_config") or {}
        fields = {key: value for key, value in config_dict.items() if key not in OWN}
        fields["dropformer_skips"] = {i: layer["skip"] for i, layer in layers.items() if "skip" in layer}
        if rest := without_skips(layers):
            fields["per_layer_config"] = rest
        return pruned_config_class(base).from_dict(fields, **kwargs)


class DropformerRemoteConfig(DropformerConfig):
    """The same for a base type that only code beside the checkpoint knows (`own_code.py`)."""

    model_type = REMOTE_TYPE

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        learn_own_code(cls.get_config_dict(path, **kwargs)[0], path, **hub_options(kwargs))
        return super().from_pretrained(path, *args, **kwargs)


def without_skips(per_layer: dict[str, dict]) -> dict[str, dict]:
    """`per_layer_config` less its skip entries: this file skips, transformers must not do it again."""
    rest = {i: {k: v for k, v in layer.items() if k != "skip"} for i, layer in per_layer.items()}
    return {i: layer for i, layer in rest.items() if layer}


@once
def cache_config_class(base: type) -> Any:
    """The subclass of a config class that tells transformers' caches which entries hold nothing."""

    class CacheConfig(base):  # type: ignore[misc, valid-type]
        empties_cache_entries = True

        @property
        def kv_sharing_modes(self) -> list[str | None]:
            """One for each cache entry: "reuse" marks those that hold nothing."""
            own = getattr(super(), "kv_sharing_modes", None) or [None] * self.num_hidden_layers
            missing = set(getattr(self, "dropformer_no_cache", []))
            return ["reuse" if i in missing else mode for i, mode in enumerate(own)]

    return CacheConfig


@once
def pruned_config_class(base: Any) -> type[PreTrainedConfig]:
    """The subclass of a family's config class that pruned checkpoints of the family use."""

    class PrunedConfig(cache_config_class(base)):  # type: ignore[misc]
        base_config_class = base
        _auto_class = None  # what a base with code of its own has: this class saves its own code

        def to_dict(self) -> dict[str, Any]:
            fields = super().to_dict()
            remote = bool(fields.get("base_auto_map"))
            fields["model_type"] = REMOTE_TYPE if remote else MODEL_TYPE
            fields["base_model_type"] = base.model_type
            layers = {str(i): layer for i, layer in (fields.get("per_layer_config") or {}).items()}
            for index, names in fields.get("dropformer_skips", {}).items():
                layers[index] = {**layers.get(index, {}), "skip": names}
            if layers:
                fields["per_layer_config"] = layers
            fields["auto_map"] = auto_map(base, remote)
            if not remote and mlx_file(base):
                fields["model_file"] = MLX_FILE
            return {key: value for key, value in fields.items() if key != "dropformer_skips"}

        def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
            """As transformers does for custom code: this file is copied beside the config, wherever it is saved."""
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            sources = {CODE_FILE: Path(__file__), **{name: Path(__file__).with_name(name) for name in COMPANIONS}}
            remote = bool(getattr(self, "base_auto_map", None))
            sources |= {MLX_FILE: path} if not remote and (path := mlx_file(base)) else {}
            if remote:
                copy_own_code(base, Path(save_directory))
            for name, source in sources.items():
                with suppress(shutil.SameFileError):
                    shutil.copyfile(source, Path(save_directory) / name)
            super().save_pretrained(save_directory, push_to_hub, **kwargs)

    PrunedConfig.__name__ = PrunedConfig.__qualname__ = f"Dropformer{base.__name__}"
    _register(base, PrunedConfig)
    return PrunedConfig


def mlx_file(base: Any) -> Path | None:
    """The file for mlx-lm, where a family has a causal LM; only the package has it, no copy of this file does."""
    path = Path(__file__).parents[1] / "engines" / MLX_FILE
    return path if path.exists() and "AutoModelForCausalLM" in auto_map(base) else None


def auto_map(base: Any, remote: bool = False) -> dict[str, str]:
    """What config.json calls the classes of this file, for every Auto class that knows a family's config."""
    stem = CODE_FILE.removesuffix(".py")
    # `is not None`: whether a lazy mapping is empty can only be told by importing every model of transformers
    mappings = {name: getattr(auto, "_model_mapping", None) for name, auto in vars(modeling_auto).items()}
    autos = [n for n, known in mappings.items() if n.startswith("AutoModel") and known is not None and base in known]
    config = DropformerRemoteConfig if remote else DropformerConfig
    return {"AutoConfig": f"{stem}.{config.__name__}"} | {name: f"{stem}.Pruned{name}" for name in autos}


def _register(base: type[PreTrainedConfig], pruned: type[PreTrainedConfig]) -> None:
    """Let every Auto class that knows the family's config find the pruned subclass of its model."""
    auto: Any
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and mapping is not None and base in mapping:
            native = mapping[base]
            if isinstance(native, type) and issubclass(native, PreTrainedModel):
                cast(Any, auto).register(pruned, pruned_model_class(native, pruned), exist_ok=True)


@once
def pruned_model_class(native: Any, config: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The subclass of a native model class that builds itself without the modules its config drops."""

    class PrunedModel(native):  # type: ignore[misc, valid-type]
        config_class = config
        _auto_class = None

        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            skip_modules(self, own_modules(self, getattr(config, "dropformer_modules", {})))
            empty_cache_entries(config)
            number_attentions(self)

        def _prepare_cache_for_generation(
            self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
        ) -> Any:
            """The native class's, and windowed layers get their entries before anything asks for one."""
            prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            if model_kwargs.get("past_key_values") is not None:
                prepare_windows(self, model_kwargs["past_key_values"], bool(generation_config.is_assistant))
            return prepared

        @classmethod
        def is_custom_code(cls) -> bool:
            """As of the native class: transformers is to rename tensors on loading as it does for that."""
            return native.is_custom_code()

    PrunedModel.__name__ = PrunedModel.__qualname__ = f"Dropformer{native.__name__}"
    PrunedModel.__module__ = __name__
    if renames := get_checkpoint_conversion_mapping(native.__name__):  # else it asks for the model_type
        register_checkpoint_conversion_mapping(PrunedModel.__name__, renames, overwrite=True)
    return PrunedModel


def base_config_class(config: PreTrainedConfig) -> type[PreTrainedConfig]:
    """The family's own config class, of a pruned config or a stock one."""
    return getattr(type(config), "base_config_class", type(config))


def empty_cache_entries(config: PreTrainedConfig) -> None:
    """Tell a composite config's text part, which makes the cache, where it holds nothing."""
    text, missing = config.get_text_config(decoder=True), getattr(config, "dropformer_no_cache", [])
    if text is not config and missing:
        text.dropformer_no_cache = missing
        if not hasattr(text, "empties_cache_entries"):
            text.__class__ = cache_config_class(type(text))


def number_attentions(model: PreTrainedModel) -> None:
    """Number the attentions of an encoder-decoder that are left one after another, those to the encoder apart.

    Its two caches are made from one config, so no entry can be marked empty in one of them alone; and the first
    entry, which is asked how long the text is, must be one that is used.  Reformer's attentions are numbered the same
    way: each appends its own entry to the cache.
    """
    two = getattr(model.config, "is_encoder_decoder", False)
    numbers: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, Skipped) or not (two or "past_buckets_states" in signature(module.forward).parameters):
            continue
        place = re.sub(r"\.\d+(?=\.|$)", "", path, count=1)
        fields = ("layer_idx",) if two else ("layer_idx", "layer_id")
        names = [name for name in fields if isinstance(getattr(module, name, None), int)]
        for name in names:
            setattr(module, name, numbers.get(place, 0))
        numbers[place] = numbers.get(place, 0) + bool(names)


def own_modules(model: PreTrainedModel, modules: dict[str, Any]) -> dict[str, Any]:
    """Module paths as `model` names them: a bare trunk lacks the name that it has in a model with a head."""
    split = {path: path.partition(".") for path in modules}
    return {path if split[path][0] in model._modules else split[path][2]: form for path, form in modules.items()}


def _factory(auto_name: str) -> type:
    """A class that remote code can name in `auto_map`: loads the right pruned class for a config."""

    class Factory:
        @classmethod
        def register_for_auto_class(cls, auto_class: Any = None) -> None:
            """Nothing to note: the checkpoint already carries this file."""

        @classmethod
        def _class(cls, config: PreTrainedConfig) -> type[PreTrainedModel]:
            known = getattr(modeling_auto, auto_name)._model_mapping
            if type(config) not in known:
                raise ValueError(f"{auto_name} has no model for {type(config).__name__}; use AutoModel or another head")
            return known[type(config)]

        @classmethod
        def from_pretrained(cls, path: str, *args: Any, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
            return cls._class(config).from_pretrained(path, *args, config=config, **kwargs)

        @classmethod
        def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
            return cls._class(config)._from_config(config, **kwargs)

    Factory.__name__ = Factory.__qualname__ = f"Pruned{auto_name}"
    Factory.__module__ = __name__
    return Factory


# One for every Auto class of models, such as PrunedAutoModelForCausalLM: a checkpoint may have any head.
for _name, _auto in list(vars(modeling_auto).items()):
    if _name.startswith("AutoModel") and hasattr(_auto, "_model_mapping"):
        globals()[f"Pruned{_name}"] = _factory(_name)

if MODEL_TYPE not in CONFIG_MAPPING or __name__.startswith("dropformer."):  # a checkpoint's copy replaces nothing
    AutoConfig.register(MODEL_TYPE, DropformerConfig, exist_ok=True)
