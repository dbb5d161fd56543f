"""How long each layer takes in one decoded token, with its cache, on the machine at hand."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dropformer.eval.cost.timing import Setting, device_of, prompt_of
from dropformer.metrics.calibration.settings import context_of
from dropformer.metrics.search.budget import Latency
from dropformer.prune.architecture import Architecture, Layer

STEPS, WARM = 16, 3


@torch.inference_mode()
def layer_latency(model: nn.Module, architecture: Architecture, context: int = 2048, steps: int = STEPS) -> Latency:
    """Median seconds of every attention and MLP layer, and of a whole step, over decode steps at batch 1.

    `context` tokens (fewer where the model reads fewer) are in the cache.  A layer's time is that of its own
    modules, norms included; adding to the stream belongs to none.  By CUDA events on a GPU, by the clock elsewhere.
    """
    room = (context_of(model.config) or context + WARM + steps) - WARM - steps
    setting = Setting(prompt=max(1, min(context, room)), new=WARM + steps)
    output = model(input_ids=prompt_of(model, setting), use_cache=True)
    past, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
    clock = _Clock(device_of(model).type == "cuda")
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


class _Clock:
    """Moments, and the seconds between two of them."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        if not self.cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000


@contextmanager
def _timing(model: nn.Module, architecture: Architecture, clock: _Clock) -> Iterator[dict[Layer, list[tuple]]]:
    """Inside the `with`, when each layer's modules begin and end."""
    spans: dict[Layer, list[tuple]] = defaultdict(list)
    with ExitStack() as hooks:
        for layer in (found for found in architecture.layers() if found.kind != "block"):
            path = architecture.block(layer).path
            for name in architecture.branches(layer)[0].modules:
                for hook in _watch(model.get_submodule(f"{path}.{name}"), spans[layer], clock):
                    hooks.callback(hook.remove)
        yield spans


def _watch(module: nn.Module, spans: list[tuple], clock: _Clock) -> list[Any]:
    begun: list[Any] = []
    return [
        module.register_forward_pre_hook(lambda *_: begun.append(clock.now())),
        module.register_forward_hook(lambda *_: spans.append((begun.pop(), clock.now()))),
    ]
