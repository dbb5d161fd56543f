"""Default batch sizes: as many tokens per pass as keep the device busy, within its free memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from dropformer.metrics.calibration.data import CalibrationData
from dropformer.metrics.calibration.images import Pictures
from dropformer.prune.loading.device import free_bytes, gpus_of, input_device

BUSY_CPU, BUSY_GPU = 256, 8192  # tokens per pass beyond which throughput no longer grows (CPU: measured, LOG.md)
SHARE = 0.5  # of a GPU's free memory that a pass may use
PATCH = 16  # approximate side of an image patch in pixels
USUAL_WIDTH = 4096  # residual stream width where the config gives none

Result = TypeVar("Result")


def busy_tokens(device: torch.device) -> int:
    """Tokens per pass beyond which throughput no longer grows."""
    return BUSY_CPU if device.type in ("cpu", "meta") else BUSY_GPU


def windows_at_once(model: nn.Module, length: int) -> int:
    """Default number of windows of `length` tokens per pass, at least one.

    On a GPU also limited by memory, with an estimate of twelve residual streams and three MLP activations per token
    in float32.  Example: D 4096 and MLP 14336 give 360 KiB per token, so 8192 tokens take 2.8 GiB.
    """
    most = busy_tokens(input_device(model))
    for gpu in gpus_of(model):
        most = min(most, int(SHARE * free_bytes(gpu)) // activation_bytes(model, length))
    return max(1, most // length)


def samples_at_once(model: nn.Module, data: CalibrationData) -> int:
    """`windows_at_once` for calibration data; an image counts as its number of patches."""
    length = data.ref.length
    return windows_at_once(model, max(1, length // PATCH) ** 2 if isinstance(data, Pictures) else length)


def some_rows(inputs: Mapping[str, Any], part: slice) -> dict[str, Any]:
    """Some samples of forward arguments; what is not one entry per sample, such as a flag, stays."""
    count = len(inputs["input_ids"])
    per_sample = [n for n, value in inputs.items() if isinstance(value, Tensor) and value.shape[:1] == (count,)]
    return {name: value[part] if name in per_sample else value for name, value in inputs.items()}


def activation_bytes(model: nn.Module, length: int) -> int:
    """Estimated bytes of activations per token of a window in one block."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    named = [getattr(text, name, None) for name in ("hidden_size", "intermediate_size", "num_attention_heads")]
    stream, inner, heads = (value if isinstance(value, int) else None for value in named)
    stream = stream or USUAL_WIDTH
    eager = getattr(config, "_attn_implementation", None) == "eager"
    scores = 2 * (heads or 32) * length if eager else 0  # eager attention keeps logits and probabilities
    return 4 * (12 * stream + 3 * (inner or 4 * stream) + scores)


class Fitting(Generic[Result]):
    """Runs a function on batches of a list; halves the batch size after an out-of-memory error."""

    def __init__(self, run: Callable[[Sequence[int]], Result]) -> None:
        self.run, self.most = run, 1 << 30

    def __call__(self, rows: Sequence[int]) -> Iterator[Result]:
        """The function's results for `rows`, one per batch.  Raises OutOfMemoryError if a single row does not fit."""
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
            torch.cuda.empty_cache()  # the failed pass's tensors were freed with its stack frames
        return None
