"""vLLM's entry point (`vllm.general_plugins`): its processes read pruned checkpoints and find their model classes.

Runs in every process of vLLM, so it imports neither torch nor a model: each architecture that vLLM knows gets a
twin named `Dropformer...`, which vLLM imports by name when a checkpoint asks for it.
"""

from __future__ import annotations

from typing import Any, cast

PREFIX = "Dropformer"
MODELS = "dropformer.prune.engines.vllm_model"
SPELLED = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
"""transformers' names of architectures that vLLM spells otherwise."""
OURS = ("base_model_type", "auto_map", "per_layer_config", "model_file")


class PrunedConfig:
    """Reads the config.json of a pruned checkpoint as the base family's own config.

    The class is transformers' own, so that vLLM's processes can pickle it and its rules by model_type apply; the
    fields `dropformer_modules` and `architectures` say what is missing.
    """

    model_type = "dropformer"

    @classmethod
    def from_dict(cls, fields: dict[str, Any], **kwargs: Any) -> Any:
        from transformers import CONFIG_MAPPING

        base = CONFIG_MAPPING[fields["base_model_type"]]
        own = {key: value for key, value in fields.items() if key not in (*OURS, "model_type")}
        layers = {
            i: {key: value for key, value in layer.items() if key != "skip"}
            for i, layer in (fields.get("per_layer_config") or {}).items()
        }
        if rest := {i: layer for i, layer in layers.items() if layer}:
            own["per_layer_config"] = rest
        return base.from_dict(own, **kwargs)


def register_configs() -> None:
    """Let transformers' AutoConfig read both formats."""
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from dropformer.prune.loading.deci.configuration_decilm import DeciLMConfig

    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
    reader = cast(type[PreTrainedConfig], PrunedConfig)  # transformers asks it for `from_dict` alone
    CONFIG_MAPPING.register(PrunedConfig.model_type, reader, exist_ok=True)


def register() -> None:
    """The entry point: the configs of both formats, and a twin of every architecture that vLLM has."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    register_configs()
    for name in [name for name in ModelRegistry.get_supported_archs() if not name.startswith(PREFIX)]:
        ModelRegistry.register_model(PREFIX + name, f"{MODELS}:{PREFIX}{name}")
        if name in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[PREFIX + name] = MODELS_CONFIG_MAP[name]
    for name, known in SPELLED.items():
        ModelRegistry.register_model(PREFIX + name, f"{MODELS}:{PREFIX}{known}")
