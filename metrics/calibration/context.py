"""How many tokens a model was made for: learned positions end there, rotary ones are of little use beyond."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropformer.prune.errors import CalibrationError

NAMES = ("max_position_embeddings", "n_positions")


def context_of(config: Any) -> int | None:
    """The context of a config or of its dictionary, the text part's where there are several; None for no bound."""
    if not isinstance(config, Mapping):
        config = config.to_dict()
    inner = config.get("text_config")
    for part in (inner, config) if isinstance(inner, Mapping) else (config,):
        found = [part[name] for name in NAMES if isinstance(part.get(name), int) and part[name] > 0]
        if found:
            return found[0]
    return None


def check_length(config: Any, tokens: int, name: str) -> None:
    """Raises CalibrationError for windows longer than the context."""
    context = context_of(config)
    if context and tokens > context:
        raise CalibrationError(
            f"windows of {tokens} tokens are longer than the context of {name}, {context}; give a smaller --length"
        )
