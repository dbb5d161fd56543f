"""Which models DeciLM can carry, told from their config.json alone.  Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropformer.prune.errors import ArchitectureError

DECI = "nemotron-nas"  # the model type of a DeciLM
FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
FOREIGN = (
    "is a Nemotron-NAS model (DeciLM) that dropformer did not write: some of its blocks lack layers, and only code "
    "that comes with it can build it"
)
QK_NORMS = ("qwen3", "qwen3_moe", "olmo2", "olmo3", "gemma3", "gemma3_text")


def is_own_deci(config: Mapping[str, Any]) -> bool:
    """Is this the config.json of a DeciLM that `--format deci` wrote, as against NVIDIA's own?"""
    return config.get("model_type") == DECI and config.get("base_model_type") in FAMILIES


def check_family(config: Mapping[str, Any]) -> None:
    """Raises ArchitectureError for the config of a model whose family, head or weights DeciLM does not have."""
    family, known = config["model_type"], ", ".join(FAMILIES)
    if family not in FAMILIES:
        why = "norms its queries and keys, which" if family in QK_NORMS else "is built in a way that"
        raise ArchitectureError(
            f"a model of type {family} {why} DeciLM cannot carry; it takes {known}: leave out --format deci"
        )
    architecture = (config.get("architectures") or [FAMILIES[family]])[0]
    if architecture != FAMILIES[family]:
        raise ArchitectureError(f"DeciLM carries {FAMILIES[family]}, not {architecture}: leave out --format deci")
    for key in ("quantization_config", "per_layer_config"):
        if config.get(key):
            raise ArchitectureError(f"--format deci cannot carry the {key} of config.json: export the plain original")
