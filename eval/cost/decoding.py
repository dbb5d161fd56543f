"""Decode speed after a cached text, models interleaved, and the time of each layer in one decode step."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dropformer.eval.cost.counting import cost_of
from dropformer.eval.cost.memory import kv_bytes
from dropformer.eval.cost.speed import Quartiles
from dropformer.eval.cost.timing import Clock, Setting, carried, last_logits, prompt_of
from dropformer.metrics.calibration.settings import context_of
from dropformer.metrics.search.budget import Latency
from dropformer.prune.architecture import Architecture, Layer
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


STEPS, WARM = 16, 3


@torch.inference_mode()
def layer_latency(model: nn.Module, architecture: Architecture, context: int = 2048, steps: int = STEPS) -> Latency:
    """Median seconds of every attention and MLP layer, and of a whole step, over decode steps at batch 1.

    The cache holds `context` tokens (at most the model's maximum length).  A layer's time is that of its own modules
    with norms, without additions to the residual stream.  Clocks: `timing.Clock`.
    """
    room = (context_of(model.config) or context + WARM + steps) - WARM - steps
    setting = Setting(prompt=max(1, min(context, room)), new=WARM + steps)
    output = model(input_ids=prompt_of(model, setting), use_cache=True, **last_logits(model))
    past, token = carried(output), output.logits[:, -1:].argmax(-1)
    clock = Clock(gpus_of(model))
    layers: dict[Layer, list[float]] = defaultdict(list)
    whole = []
    for _ in range(setting.new):
        with _timing(model, architecture, clock) as spans:
            begin = clock.now()
            token = model(input_ids=token, **past, use_cache=True).logits[:, -1:].argmax(-1)
            whole.append(clock.seconds(begin, clock.now()))
        for layer in spans:
            layers[layer].append(sum(clock.seconds(*span) for span in spans[layer]))
    return Latency(
        {layer: statistics.median(seconds[WARM:]) for layer, seconds in layers.items()}, statistics.median(whole[WARM:])
    )


@contextmanager
def _timing(model: nn.Module, architecture: Architecture, clock: Clock) -> Iterator[dict[Layer, list[tuple]]]:
    """Start and end of each layer's modules in the forward passes inside the `with`."""
    spans: dict[Layer, list[tuple]] = defaultdict(list)
    with ExitStack() as hooks:
        for layer in (found for found in architecture.layers() if found.kind != "block"):
            path = architecture.block(layer).path
            for name in architecture.branches(layer)[0].modules:
                for hook in _watch(model.get_submodule(f"{path}.{name}"), spans[layer], clock):
                    hooks.callback(hook.remove)
        yield spans


def _watch(module: nn.Module, spans: list[tuple], clock: Clock) -> list[Any]:
    begun: list[Any] = []
    return [
        module.register_forward_pre_hook(lambda *_: begun.append(clock.now())),
        module.register_forward_hook(lambda *_: spans.append((begun.pop(), clock.now()))),
    ]
