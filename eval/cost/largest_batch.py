"""The largest batch at which every compared model fits into a GPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from dropformer.eval.cost.memory import kv_bytes_per_token
from dropformer.eval.cost.timing import Setting, fits_in_memory
from dropformer.prune.errors import EvaluationError
from dropformer.prune.loading.device import free_bytes, gpus_of

HEADROOM = 1.0625  # decoding briefly holds the cache of one layer twice, and keys repeated for every query head


def with_batch(models: Mapping[str, nn.Module], setting: Setting, static: bool = False) -> Setting:
    """The setting with batch "max" replaced by the largest number at which every model fits, so that all run alike.

    Each trial runs one prefill beside as many bytes as the KV cache will have grown to; `static`: the caches of all
    models are held at once.  Raises EvaluationError without a GPU, and where batch 1 does not fit.
    """
    if setting.batch != "max":
        return setting
    gpus = {gpu for model in models.values() for gpu in gpus_of(model)}
    if len(gpus) != 1:
        where = "the models are on several" if gpus else "the model is not on one"
        raise EvaluationError(f"batch `max` fills a GPU's memory, and {where}; give a number")
    per_token = {name: kv_bytes_per_token(model) for name, model in models.items()}
    tokens = setting.prompt + setting.new
    held = sum(per_token.values()) if static else max(per_token.values())

    def fits(batch: int) -> bool:
        others = {name: sum(per_token.values()) - own if static else 0 for name, own in per_token.items()}
        return all(
            fits_in_memory(
                model,
                replace(setting, batch=batch),
                int(HEADROOM * batch * (setting.new * per_token[name] + tokens * others[name])),
            )
            for name, model in models.items()
        )

    batch = largest_batch(fits, guess=free_bytes(gpus.pop()) // max(1, int(HEADROOM * held * tokens)))
    if not batch:
        raise EvaluationError(f"{setting} does not fit in this GPU's memory even at batch 1; use fewer tokens")
    return replace(setting, batch=batch)


def largest_batch(fits: Callable[[int], bool], guess: int = 1) -> int:
    """The largest batch that fits, to within an eighth of it; 0 if 1 does not.

    From `guess` doubled until one fails or halved until one fits, then the gap is halved:
    for a limit of 11 and a guess of 1: 1, 2, 4, 8 fit, 16 does not, 12 does not, 10 fits, 11 fits.
    """
    low, high, batch = 0, 0, max(1, guess)
    while not high or high - low > max(1, low // 8):
        if fits(batch):
            low = batch
        else:
            high = batch
        if high == 1:
            return 0
        batch = (low + high) // 2 if high else 2 * low
    return low
