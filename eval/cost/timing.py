"""One timed run: a prefill over the prompt, then decode steps that read the KV cache."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import StaticCache

from dropformer.eval.cost.memory import kv_bytes
from dropformer.prune.loading.device import gpus_of, input_device

Step = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """One point of the grid: batch size, prompt tokens, tokens decoded after it."""

    prompt: int
    new: int
    batch: int | Literal["max"] = 1

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.prompt} + {self.new} tokens"


@dataclass(frozen=True)
class Took:
    """Wall-clock seconds, and CPU seconds of all threads of this process (meaningless on a GPU)."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Run:
    """One prefill and all decode steps after it."""

    prefill: Took
    decode: Took
    kv_bytes: int


class Clock:
    """Time stamps on the model's devices, and the seconds between two of them.

    On one GPU, CUDA events on its current stream, without synchronization.  On several, whose events cannot be
    compared, the host's clock after synchronizing all.  Without a GPU, the host's clock.
    """

    def __init__(self, gpus: Sequence[torch.device] = ()) -> None:
        self.gpus = list(gpus)

    def now(self) -> Any:
        if len(self.gpus) == 1:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.gpus[0]))
            return event
        self.settle()
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        if len(self.gpus) == 1:
            end.synchronize()
            return begin.elapsed_time(end) / 1000
        return end - begin

    def settle(self) -> None:
        """Wait until every GPU is idle."""
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)

    def timed(self, function: Callable[[], Any]) -> tuple[Any, Took]:
        """The function's result, and the seconds it took."""
        self.settle()
        cpu, begin = time.process_time(), self.now()
        result = function()
        end = self.now()
        self.settle()
        return result, Took(self.seconds(begin, end), time.process_time() - cpu)


@torch.inference_mode()
def time_run(model: nn.Module, setting: Setting, step: Step | None = None, cache: StaticCache | None = None) -> Run:
    """One prefill and `setting.new` greedy decode steps, each timed as a whole.

    Decode calls `step` (default: the model's forward).  A static `cache` is reset and reused: a compiled step's CUDA
    graphs refer to that cache's memory.
    """
    clock = Clock(gpus_of(model))
    step = model if step is None else step  # a compiled module has no truth value
    ids = prompt_of(model, setting)
    if cache is not None:
        cache.reset()

    def prefill() -> Any:
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **last_logits(model))

    output, prefill_took = clock.timed(prefill)
    past, token = carried(output), output.logits[:, -1:].argmax(-1)
    del output

    def decode() -> None:
        nonlocal token
        for _ in range(setting.new):
            if cache is not None and clock.gpus:
                torch.compiler.cudagraph_mark_step_begin()
            token = step(input_ids=token, **past, use_cache=True).logits[:, -1:].argmax(-1)

    _, decode_took = clock.timed(decode)
    return Run(prefill_took, decode_took, kv_bytes(next(iter(past.values()), None)))


def carried(output: Any) -> dict[str, Any]:
    """The argument with which the next forward pass goes on: the KV cache, or Mamba's or RWKV's state."""
    names = ("past_key_values", "cache_params", "state")
    return next(({name: output[name]} for name in names if output.get(name) is not None), {})


def last_logits(model: nn.Module) -> dict[str, int]:
    """The argument that limits logits to the last position, if the model takes it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def fits_in_memory(model: nn.Module, setting: Setting, ballast: int) -> bool:
    """Whether a prefill at this setting (with a numeric batch) fits on the GPU beside `ballast` more bytes."""
    try:
        held = torch.empty(ballast, dtype=torch.uint8, device=input_device(model))
        time_run(model, Setting(setting.prompt, 2, setting.batch))
        del held
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()


def decoder(model: nn.Module, compile: bool) -> Step:
    """The function that computes decode steps."""
    return torch.compile(model, mode="reduce-overhead") if compile else model


def static_cache(model: nn.Module, setting: Setting) -> StaticCache:
    """A cache of fixed size for one setting, allocated in its first prefill."""
    config: Any = model.config
    return StaticCache(config=config, max_cache_len=setting.prompt + setting.new)


def prompt_of(model: nn.Module, setting: Setting) -> Tensor:
    """Random token ids, the same for every model with the same vocabulary.  [batch, prompt]"""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (int(setting.batch), setting.prompt)
    ids = torch.randint(config.get_text_config(decoder=True).vocab_size, shape, generator=generator)
    return ids.to(input_device(model))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
