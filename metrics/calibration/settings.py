"""Calibration settings, their record in artifacts, and a model's context length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dropformer.prune.artifact import FrozenRecord
from dropformer.prune.errors import CalibrationError

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Calibration:
    """Calibration settings: `samples` windows of `length` tokens.

    `packed` windows come from concatenated documents; otherwise each window is the start of one document, padded,
    and padding is not scored.  The first `skip_first` tokens of every window are run but not scored: the first
    token is an attention sink whose huge norm says little about the layer (arXiv 2309.17453).
    """

    name: str = "builtin"
    samples: int = 64
    length: int = 512
    seed: int = 0
    packed: bool = True
    skip_first: int = 0


class CalibrationRef(FrozenRecord):
    """A calibration in an artifact; `hash` is the SHA-256 of the token ids and the scored positions."""

    name: str
    samples: int
    length: int
    seed: int
    packed: bool
    skip_first: int
    hash: str


def context_of(config: Any) -> int | None:
    """The context length in tokens that a config (or its dictionary) gives, in its text part if it has one, or None.

    Learned position embeddings end there, and rotary ones were not trained beyond.
    """
    if not isinstance(config, Mapping):
        config = config.to_dict()
    inner = config.get("text_config")
    for part in (inner, config) if isinstance(inner, Mapping) else (config,):
        found = [part[name] for name in CONTEXT_FIELDS if isinstance(part.get(name), int) and part[name] > 0]
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
