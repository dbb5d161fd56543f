"""vLLM's entry point: where dropformer is installed, `vllm serve` reads a deci checkpoint's config without
--trust-remote-code.  Nothing heavy is imported until vLLM calls `register`, in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Let transformers, and so vLLM, read `model_type: nemotron-nas`."""
    from transformers import AutoConfig

    from dropformer.prune.loading.configuration_decilm import DeciLMConfig

    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
