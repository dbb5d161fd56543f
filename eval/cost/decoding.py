"""Decode speed after a cached text, models interleaved, with upper bounds from bytes read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dropformer.eval.cost.counting import cost_of
from dropformer.eval.cost.memory import kv_bytes
from dropformer.eval.cost.speed import Quartiles
from dropformer.eval.cost.timing import Clock
from dropformer.prune.loading.device import gpus_of, input_device

REPEATS, NEW = 7, 8


@dataclass(frozen=True)
class Decoding:
    """Tokens/s, their ratio to the first model's per repeat, and its upper bound from bytes of weights and KV cache.

    kv_bytes: size of the cache before the first token.
    """

    kv_bytes: int
    speed: Quartiles
    ratio: Quartiles
    bound: float


@torch.inference_mode()
def decode_behind(
    models: Mapping[str, nn.Module], caches: Mapping[str, Any], repeats: int = REPEATS, new: int = NEW
) -> dict[str, Decoding]:
    """Decode `new` tokens `repeats` times with every model, batch 1, continuing its cache; the first is the dense one.

    Each model runs once before as a warm-up.  Memory: the caches of all models at once.
    """
    held = {name: kv_bytes(cache) for name, cache in caches.items()}
    context = next(iter(caches.values())).get_seq_length()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        turn = repeat % len(models)
        names = list(models)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(_decode(models[name], caches[name], new if repeat else 2) / new)
    first = next(iter(models))
    work = {name: cost_of(model).decode_elements(1, context + new * repeats // 2) for name, model in models.items()}
    return {
        name: Decoding(
            held[name],
            Quartiles.of([1 / one for one in own[1:]]),
            Quartiles.of([before / after for before, after in zip(seconds[first][1:], own[1:], strict=True)]),
            work[first] / work[name],
        )
        for name, own in seconds.items()
    }


def _decode(model: nn.Module, cache: Any, new: int) -> float:
    """Seconds of `new` greedy tokens."""
    token = torch.ones((1, 1), dtype=torch.long, device=input_device(model))

    def run() -> None:
        nonlocal token
        for _ in range(new):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return Clock(gpus_of(model)).timed(run)[1].wall
