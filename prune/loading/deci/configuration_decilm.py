"""The config of a DeciLM checkpoint: Llama blocks of which some lack their attention or their MLP.

This file is self-contained (transformers only, 4 or 5).  A copy lies beside the weights of every checkpoint
of the format `deci`, where `trust_remote_code` finds it; `registration` registers it where dropformer is
installed.  Engines read `config.block_configs[i].attention.no_op`, so entries answer to attributes and are JSON.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class Entry(dict):
    """A JSON object whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"a block's config has no `{name}`")


class DeciLMConfig(PretrainedConfig):
    """Stands for `model_type: nemotron-nas`, the name under which engines know the architecture."""

    model_type = "nemotron-nas"

    def __init__(
        self,
        block_configs: Any = (),
        rope_parameters: dict[str, Any] | None = None,
        max_position_embeddings: int = 8192,
        **fields: Any,
    ) -> None:
        self.block_configs = [Entry({k: Entry(v) for k, v in block.items()}) for block in block_configs]
        # Before the rest: transformers completes rotary settings from the length while it reads it.
        self.rope_parameters, self.max_position_embeddings = rope_parameters, max_position_embeddings
        super().__init__(**fields)
