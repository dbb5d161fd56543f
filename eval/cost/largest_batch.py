"""The largest batch size at which every compared model fits in a GPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from torch import nn

from dropformer.eval.cost.memory import kv_bytes_per_token
from dropformer.eval.cost.timing import Setting, fits_in_memory
from dropformer.prune.errors import EvaluationError
from dropformer.prune.loading.device import free_bytes, gpus_of

HEADROOM = 1.0625  # decoding briefly holds one layer's cache twice, and keys repeated for every query head


def with_batch(models: Mapping[str, nn.Module], setting: Setting, static: bool = False) -> Setting:
    """The setting with batch "max" replaced by the largest batch size at which every model fits.

    Each trial runs one prefill beside an allocation of the KV cache's final size; `static`: the caches of all models
    are held at once.  Raises EvaluationError without a single GPU, and if batch 1 does not fit.
    """
    if setting.batch != "max":
        return setting
    gpus = {gpu for model in models.values() for gpu in gpus_of(model)}
    if len(gpus) != 1:
        where = "the models are on several" if gpus else "the model is not on one"
        raise EvaluationError(f"batch `max` fills a GPU's memory, and {where}; give a number")
    per_token = {name: kv_bytes_per_token(model) for name, model in models.items()}
    whole, tokens = sum(per_token.values()), setting.prompt + setting.new

    def fits(name: str, batch: int) -> bool:
        others = whole - per_token[name] if static else 0
        ballast = HEADROOM * batch * (setting.new * per_token[name] + tokens * others)
        return fits_in_memory(models[name], replace(setting, batch=batch), int(ballast))

    # The model with the largest cache nearly always decides: the others are only checked at its batch.
    first, *rest = sorted(models, key=lambda name: per_token[name], reverse=True)
    held = whole if static else per_token[first]
    guess = free_bytes(gpus.pop()) // max(1, int(HEADROOM * held * tokens))
    batch = largest_batch(partial(fits, first), guess)
    for name in rest if batch else ():
        batch = largest_batch(partial(fits, name), batch, most=batch)
    if not batch:
        raise EvaluationError(f"{setting} does not fit in this GPU's memory even at batch 1; use fewer tokens")
    return replace(setting, batch=batch)


def largest_batch(fits: Callable[[int], bool], guess: int = 1, most: int | None = None) -> int:
    """The largest batch that fits, at most `most`, to within an eighth of it; 0 if 1 does not.

    From `guess`, in steps that start at an eighth and double, up until one fails or down until one fits; then by
    bisection.  For a limit of 27 and a guess of 32: 32 and 28 do not fit, 20 does, 24 does, 26 does.
    For a limit of 11 and a guess of 1: 1, 2, 4, 8 fit, 16 does not, 12 does not, 10 fits, 11 fits.
    """
    low, high, batch, step = 0, 0 if most is None else most + 1, max(1, guess), max(1, guess // 8)
    while True:
        if fits(batch):
            low = batch
        else:
            high = batch
        if high == 1 or (low and high and high - low <= max(1, low // 8)):
            return low
        if low and high:
            batch = (low + high) // 2
        else:
            batch = batch + step if low else max(1, batch - step)
            step *= 2
