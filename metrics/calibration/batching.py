"""How many windows run at once: as many tokens as keep the device busy, within what is free there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from dropformer.metrics.calibration.data import CalibrationData
from dropformer.metrics.calibration.images import Pictures
from dropformer.prune.loading.device import free_bytes, gpus_of, input_device

BUSY_CPU, BUSY_GPU = 256, 8192  # tokens in a pass beyond which more at once gain nothing (CPU: measured, LOG.md)
SHARE = 0.5  # of a GPU's free memory that a pass may take
PATCH = 16  # pixels along the side of an image's patch, about
USUAL_WIDTH = 4096  # of a stream where no config says it

Result = TypeVar("Result")


def busy_tokens(device: torch.device) -> int:
    """Tokens in a pass beyond which more at once gain nothing."""
    return BUSY_CPU if device.type in ("cpu", "meta") else BUSY_GPU


def windows_at_once(model: nn.Module, length: int) -> int:
    """How many windows of `length` tokens run in one pass where nobody said: at least one.

    On a GPU what fits counts too, by about what a token's activations take: twelve streams and three MLP activations
    in float32.  Example: D 4096 and MLP 14336 give 360 KiB a token, so 8192 tokens take 2.8 GiB.
    """
    most = busy_tokens(input_device(model))
    for gpu in gpus_of(model):
        most = min(most, int(SHARE * free_bytes(gpu)) // activation_bytes(model, length))
    return max(1, most // length)


def samples_at_once(model: nn.Module, data: CalibrationData) -> int:
    """`windows_at_once` for calibration data; an image counts as its patches."""
    length = data.ref.length
    return windows_at_once(model, max(1, length // PATCH) ** 2 if isinstance(data, Pictures) else length)


def activation_bytes(model: nn.Module, length: int) -> int:
    """About what one token of a window takes on its way through a block."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = [getattr(text, name, None) for name in ("hidden_size", "intermediate_size", "num_attention_heads")]
    stream, inner, heads = (value if isinstance(value, int) else None for value in named)
    stream = stream or USUAL_WIDTH
    eager = getattr(config, "_attn_implementation", None) == "eager"
    scores = 2 * (heads or 32) * length if eager else 0  # of every query against every key, twice
    return 4 * (12 * stream + 3 * (inner or 4 * stream) + scores)


class Fitting(Generic[Result]):
    """Runs a function on parts of a list, with half as many at a time once the device's memory did not hold them."""

    def __init__(self, run: Callable[[Sequence[int]], Result]) -> None:
        self.run, self.most = run, 1 << 30

    def __call__(self, rows: Sequence[int]) -> Iterator[Result]:
        """What the function gives for `rows`, whole or by parts.  Raises OutOfMemoryError where one does not fit."""
        start = 0
        while start < len(rows):
            part = rows[start : start + self.most]
            found = self._tried(part)
            if found is not None:
                yield found
                start += len(part)

    def _tried(self, part: Sequence[int]) -> Result | None:
        try:
            return self.run(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            self.most = len(part) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the failed pass held was freed with its frames
        return None
