"""One timed run: a prefill over the prompt, then decode steps that read the KV cache."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import StaticCache

from dropformer.eval.cost.memory import kv_bytes, kv_bytes_per_token

Step = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """One point of the grid: batch, tokens of the prompt, tokens decoded after it."""

    prompt: int
    new: int
    batch: int | Literal["max"] = 1

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.prompt} + {self.new} tokens"


@dataclass(frozen=True)
class Took:
    """Seconds on the clock, and seconds of all of this process's threads (of no meaning on a GPU)."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Run:
    """A prefill, and all of the decode steps behind it."""

    prefill: Took
    decode: Took
    kv_bytes: int


@torch.inference_mode()
def time_run(model: nn.Module, step: Step, setting: Setting, static: bool) -> Run:
    """One prefill and `setting.new` greedy decode steps, each timed as a whole."""
    device = device_of(model)
    ids = prompt_of(model, setting)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = _static_cache(model, setting) if static else None

    def prefill() -> Any:
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **keep)

    output, prefill_took = _timed(prefill, device)
    past, token = output.past_key_values, output.logits[:, -1:].argmax(-1)

    def decode() -> None:
        nonlocal token
        for _ in range(setting.new):
            if static and device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            token = step(input_ids=token, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1)

    _, decode_took = _timed(decode, device)
    return Run(prefill_took, decode_took, kv_bytes(past))


def _timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, Took]:
    """Its result and its seconds: CUDA events on a GPU, the clock and processor time elsewhere."""
    if device.type != "cuda":
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        return result, Took(time.perf_counter() - wall, time.process_time() - cpu)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    cpu = time.process_time()
    begin.record()
    result = function()
    end.record()
    torch.cuda.synchronize(device)
    return result, Took(begin.elapsed_time(end) / 1000, time.process_time() - cpu)


def fits_in_memory(model: nn.Module, setting: Setting, batch: int) -> bool:
    """Whether a GPU holds a run at this batch: its prompt is run beside as many bytes as the cache will grow."""
    try:
        growth = batch * setting.new * kv_bytes_per_token(model)
        ballast = torch.empty(growth, dtype=torch.uint8, device=device_of(model))
        time_run(model, model, Setting(setting.prompt, 2, batch), static=False)
        del ballast
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()


def decoder(model: nn.Module, compile: bool) -> Step:
    """The forward that decode steps go through."""
    return torch.compile(model, mode="reduce-overhead") if compile else model


def _static_cache(model: nn.Module, setting: Setting) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=setting.prompt + setting.new)  # type: ignore[arg-type]


def prompt_of(model: nn.Module, setting: Setting) -> Tensor:
    """Random token ids, the same for every model of one vocabulary.  [batch, prompt]"""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr, operator]
    generator = torch.Generator().manual_seed(0)
    shape = (int(setting.batch), setting.prompt)
    return torch.randint(vocabulary, shape, generator=generator).to(device_of(model))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
