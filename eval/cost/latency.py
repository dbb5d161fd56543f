"""Measured time of each layer in one decode step."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dropformer.eval.cost.timing import Clock, Setting, last_logits, prompt_of
from dropformer.metrics.calibration.settings import context_of
from dropformer.metrics.search.budget import Latency
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.loading.device import gpus_of

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
    past, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
    clock = Clock(gpus_of(model))
    layers: dict[Layer, list[float]] = defaultdict(list)
    whole = []
    for _ in range(setting.new):
        with _timing(model, architecture, clock) as spans:
            begin = clock.now()
            token = model(input_ids=token, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1)
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
