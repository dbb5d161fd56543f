"""Speed of prefill and decode, measured separately, with the real KV cache, models interleaved in one run.

A prefill is one forward pass over the prompt that fills the cache and computes the last position's logits; a decode
step is one forward pass over one token that reads the cache.  Both call the model's own forward: the cost of
`generate` without its bookkeeping.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import nn

from dropformer.eval.cost.counting import cost_of
from dropformer.eval.cost.largest_batch import with_batch
from dropformer.eval.cost.memory import Peak, peak_of
from dropformer.eval.cost.model_cost import ModelCost
from dropformer.eval.cost.timing import Run, Setting, Step, decoder, device_name, static_cache, time_run
from dropformer.metrics.calibration.settings import context_of
from dropformer.prune.errors import EvaluationError
from dropformer.prune.loading.device import input_device

__all__ = ["PAPER", "Quartiles", "Setting", "Speed", "SpeedTable", "bounds", "grid", "measure", "quick"]

PAPER = Setting(prompt=2048, new=2048, batch="max")  # as arXiv 2406.15786 measures its speed-ups


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def spread(self) -> float:
        """Interquartile range."""
        return self.high - self.low

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Speed:
    """One model at one setting.  Speeds in tokens/s; ratios over the first model per repeat.

    bound_prefill, bound_decode: upper bounds of the ratios, from FLOPs, and from parameter and KV bytes.  A measured
    ratio above its bound means that dropped layers also had other costs: cache copies, kernel launches.
    prefill_cpu, decode_cpu: CPU seconds of all threads, and their ratios; they are the least disturbed by other
    programs, and meaningless on a GPU.
    """

    model: str
    setting: Setting
    prefill: Quartiles
    decode: Quartiles
    prefill_ratio: Quartiles
    decode_ratio: Quartiles
    prefill_cpu: Quartiles
    decode_cpu: Quartiles
    prefill_cpu_ratio: Quartiles
    decode_cpu_ratio: Quartiles
    bound_prefill: float
    bound_decode: float
    kv_bytes: int
    peak: Peak
    repeats: int


@dataclass(frozen=True)
class SpeedTable:
    """Every model at every setting, and the device."""

    rows: tuple[Speed, ...]
    device: str
    threads: int
    dtype: str
    compiled: bool

    def row(self, model: str, setting: Setting | None = None) -> Speed:
        """The row of a model (at its first setting if none is named).  Raises KeyError if there is none."""
        for row in self.rows:
            if row.model == model and setting in (None, row.setting):
                return row
        raise KeyError(model)

    def __str__(self) -> str:
        """A terminal table: speeds in tokens/s, medians over the repeats with quartiles."""
        head = f"{self.device}, {self.threads} threads, {self.dtype}{', compiled' if self.compiled else ''}"
        return "\n".join([head, *(_line(row) for row in self.rows)])


def grid(batches: Iterable[int], prompts: Iterable[int], new: int) -> list[Setting]:
    """Every batch with every prompt length."""
    return [Setting(prompt, new, batch) for batch, prompt in product(batches, prompts)]


def measure(
    models: Mapping[str, nn.Module],
    settings: Sequence[Setting],
    repeats: int = 5,
    *,
    compile: bool = False,
    seconds: float | None = None,
    warm: bool = True,
) -> SpeedTable:
    """Measure every model at every setting; the others are compared with the first model.

    In each repeat every model runs once, and the order rotates between repeats, so that a slowdown of the machine
    affects all of them.  `compile`: decode with torch.compile and one StaticCache per model, reset before each run, so
    that its CUDA graphs are recorded once, in the warm-up.  `seconds`: start no further repeat of a setting after this
    time (each runs at least once).  `warm`: run every model briefly first.  If batch "max" runs out of memory anyway,
    as compiled steps can, an eighth less is tried.  Raises EvaluationError for an empty grid, or batch "max" without a
    GPU.
    """
    if not models or not settings or repeats < 1:
        raise EvaluationError("nothing to measure; expected at least one model, one setting and one repeat")
    steps = fresh_decoders(models, compile)
    works = {name: cost_of(model) for name, model in models.items()}
    rows: list[Speed] = []
    for asked in settings:
        setting = with_batch(models, asked, static=compile)
        while True:
            try:
                rows += _measure_one(models, steps, works, setting, _Plan(repeats, compile, seconds, warm))
                break
            except torch.OutOfMemoryError:  # the memory of CUDA graphs is known only once they are recorded
                if asked.batch != "max" or setting.batch == 1:
                    raise
            setting = replace(setting, batch=int(setting.batch) * 7 // 8)
            steps = fresh_decoders(models, compile)
    first = next(iter(models.values()))
    return SpeedTable(
        tuple(rows),
        device_name(input_device(first)),
        torch.get_num_threads(),
        str(next(first.parameters()).dtype).removeprefix("torch."),
        compile,
    )


def quick(models: Mapping[str, nn.Module], seconds: float = 18.0, repeats: int = 3) -> SpeedTable:
    """`measure` at batch 1, with prompt and new tokens chosen to take about `seconds` in all.

    The number of tokens follows from a short run of every model after a warm-up.
    """
    start = time.perf_counter()
    trial = Setting(prompt=32, new=4)
    for model in models.values():
        time_run(model, Setting(prompt=8, new=1))
    runs = [time_run(model, trial) for model in models.values()]
    left = max(0.0, seconds - (time.perf_counter() - start)) / repeats
    prompt = 0.4 * left / sum(run.prefill.wall for run in runs) * trial.prompt
    new = 0.6 * left / sum(run.decode.wall for run in runs) * trial.new
    room = min(context_of(model.config) or 10**9 for model in models.values())
    setting = Setting(prompt=_clamp(prompt, 16, min(512, room // 2)), new=_clamp(new, 4, min(128, room // 2)))
    return measure(models, [setting], repeats, seconds=0.8 * seconds, warm=False)


def fresh_decoders(models: Mapping[str, nn.Module], compile: bool) -> dict[str, Step]:
    """The decode function of each model, after memory of earlier compiled ones is freed."""
    if compile:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {name: decoder(model, compile) for name, model in models.items()}


def bounds(reference: ModelCost, work: ModelCost, setting: Setting) -> tuple[float, float]:
    """Upper bounds of the speed-ups over `reference`: prefill by FLOPs, decode by bytes read.

    Decode is counted half-way through the new tokens.  setting.batch must be a number.
    """
    batch, context = int(setting.batch), setting.prompt + setting.new // 2
    prefill = reference.prefill_flops(batch, setting.prompt) / work.prefill_flops(batch, setting.prompt)
    decode = reference.decode_elements(batch, context) / work.decode_elements(batch, context)
    return prefill, decode


@dataclass(frozen=True)
class _Plan:
    repeats: int
    compile: bool
    seconds: float | None
    warm: bool


def _measure_one(
    models: Mapping[str, nn.Module],
    steps: Mapping[str, Step],
    works: Mapping[str, ModelCost],
    setting: Setting,
    plan: _Plan,
) -> list[Speed]:
    names = list(models)
    caches = {name: static_cache(models[name], setting) if plan.compile else None for name in names}
    # A compiled step is specialized to its cache and the cache's length, so its warm-up is a whole run.
    warm_up = setting if plan.compile else Setting(min(setting.prompt, 64), 2, setting.batch)
    for name in names if plan.warm else ():
        time_run(models[name], warm_up, steps[name], caches[name])
    runs: dict[str, list[Run]] = {name: [] for name in names}
    peaks: dict[str, Peak] = {}
    start = time.perf_counter()
    for repeat in range(plan.repeats):
        if repeat and plan.seconds is not None and time.perf_counter() - start > plan.seconds:
            break
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            run, peak = _run_peak(
                models[name], partial(time_run, models[name], setting, steps[name], caches[name]), repeat == 0
            )
            runs[name].append(run)
            peaks.setdefault(name, peak)
    return [_speed(name, setting, runs, peaks[name], works) for name in names]


def _speed(
    name: str, setting: Setting, runs: Mapping[str, list[Run]], peak: Peak, works: Mapping[str, ModelCost]
) -> Speed:
    reference, own, batch = next(iter(runs)), runs[name], int(setting.batch)
    pairs = list(zip(runs[reference], own, strict=True))

    def ratio(seconds: Callable[[Run], float]) -> Quartiles:
        return Quartiles.of([seconds(before) / seconds(after) for before, after in pairs])

    bound_prefill, bound_decode = bounds(works[reference], works[name], setting)
    return Speed(
        model=name,
        setting=setting,
        prefill=Quartiles.of([batch * setting.prompt / run.prefill.wall for run in own]),
        decode=Quartiles.of([batch * setting.new / run.decode.wall for run in own]),
        prefill_ratio=ratio(lambda run: run.prefill.wall),
        decode_ratio=ratio(lambda run: run.decode.wall),
        prefill_cpu=Quartiles.of([run.prefill.cpu for run in own]),
        decode_cpu=Quartiles.of([run.decode.cpu for run in own]),
        prefill_cpu_ratio=ratio(lambda run: run.prefill.cpu),
        decode_cpu_ratio=ratio(lambda run: run.decode.cpu),
        bound_prefill=bound_prefill,
        bound_decode=bound_decode,
        kv_bytes=own[0].kv_bytes,
        peak=peak,
        repeats=len(own),
    )


def _run_peak(model: nn.Module, run: Callable[[], Run], watch: bool) -> tuple[Run, Peak]:
    """A run, with its peak memory if `watch` (reading the peak costs a little time)."""
    return peak_of(run, input_device(model)) if watch else (run(), Peak(0, ""))


def _clamp(value: float, low: int, high: int) -> int:
    return int(min(max(value, low), high))


def _line(row: Speed) -> str:
    return "; ".join(
        (
            f"{row.model:<12} {row.setting}",
            f"prefill {row.prefill} tokens/s, {row.prefill_ratio.median:.3f}x (work allows {row.bound_prefill:.3f}x)",
            f"decode {row.decode} tokens/s, {row.decode_ratio.median:.3f}x (bytes allow {row.bound_decode:.3f}x)",
            f"processor time {row.prefill_cpu_ratio.median:.3f}x, {row.decode_cpu_ratio.median:.3f}x",
            f"KV {row.kv_bytes / 2**20:.2f} MiB, peak {row.peak}, {row.repeats} repeats",
        )
    )
