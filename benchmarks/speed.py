"""Speed of SmolLM2-135M with 12 of 30 attention layers dropped, against the dense model and against the limits.

    python benchmarks/speed.py [--quick] [--model smollm2-135m] [--drop attn:12] [--repeats 5] [--compile]

Prefill and decode are measured apart with the real KV cache, both models interleaved in one run. Beside each
ratio is what FLOPs (prefill) and parameter and KV bytes (decode) allow, and what the roofline estimate says
for this machine, measured in the same run: `estimate_*_off` is its error in percent of the dense model's
processor seconds of each thread. On a busy machine read the `cpu` ratios, of processor time, which other programs
disturb least.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import dropformer
from dropformer import api
from dropformer.eval.cost.counting import cost_of
from dropformer.eval.cost.estimate import Estimate
from dropformer.eval.cost.hardware import Hardware, measure_cpu
from dropformer.eval.cost.roofline import KERNELS, Side, Times, Workload
from dropformer.eval.cost.speed import PAPER, Setting, Speed, SpeedTable, grid, measure

# The most redundant attention layers of SmolLM2-135M on the builtin calibration, so that no analysis is needed.
SMOLLM2_12 = "attn=3,4,5,6,7,9,14,25,26,27,28,29"


def dense_and_pruned(model: str, drop: str) -> dict[str, nn.Module]:
    """Both models, sharing the kept weights.  A spec that names its layers (`attn=6,7`) needs no analysis."""
    opened = dropformer.open_model(model)
    if "=" in drop:
        plan = api.plan_unscored(opened.ref, api.outline(opened.model), drop, (), None)
    else:
        plan = dropformer.plan(dropformer.analyze(opened), drop)
    return {"dense": opened.model, "pruned": dropformer.drop(opened, plan)}


def settings(quick: bool, gpu: bool) -> list[Setting]:
    if quick:
        return [Setting(prompt=256, new=24)]
    small = grid([1, 4], [128, 512, 1024], new=32)
    return [*grid([1, 8], [512, 2048], new=128), PAPER] if gpu else small


def estimated(table: SpeedTable, models: dict[str, nn.Module], setting: Setting, here: Hardware) -> Estimate:
    """What the estimate says for this machine, in the dtype and at the lengths of a measured setting."""
    workload = Workload(setting.prompt + setting.new, int(setting.batch), setting.new, table.dtype)
    dense, pruned = (Side(cost_of(model), workload, here) for model in models.values())
    return Estimate(dense, pruned)


def off(row: Speed, times: Times, threads: int) -> tuple[float, float]:
    """Error of the estimated seconds, in percent of the processor seconds of each thread: prefill, decode."""
    measured = row.prefill_cpu.median / threads, row.decode_cpu.median / threads
    return 100 * (times.prefill / measured[0] - 1), 100 * (times.decode / measured[1] - 1)


def figures(table: SpeedTable, guess: Estimate | None, setting: Setting) -> dict[str, Any]:
    """The last line of the output, from one setting."""
    dense, pruned = table.row("dense", setting), table.row("pruned", setting)
    line: dict[str, Any] = {
        "benchmark": "speed",
        "prefill_ratio": round(pruned.prefill_ratio.median, 3),
        "prefill_spread": round(pruned.prefill_ratio.spread, 3),
        "decode_ratio": round(pruned.decode_ratio.median, 3),
        "decode_spread": round(pruned.decode_ratio.spread, 3),
        "prefill_cpu_ratio": round(pruned.prefill_cpu_ratio.median, 3),
        "decode_cpu_ratio": round(pruned.decode_cpu_ratio.median, 3),
        "bound_prefill": round(pruned.bound_prefill, 3),
        "bound_decode": round(pruned.bound_decode, 3),
        "setting": str(pruned.setting),
        "repeats": pruned.repeats,
        "device": table.device,
        "threads": table.threads,
        "dtype": table.dtype,
        "kv_mib": [round(row.kv_bytes / 2**20, 2) for row in (dense, pruned)],
    }
    if guess is not None:
        speedup, times = guess.speedup("sdpa"), guess.dense.times["sdpa"]
        line["estimate_prefill_ratio"], line["estimate_decode_ratio"] = (
            round(speedup.prefill, 3),
            round(speedup.decode, 3),
        )
        line["estimate_prefill_off"], line["estimate_decode_off"] = (
            round(x, 1) for x in off(dense, times, table.threads)
        )
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one setting, within a minute on two cores")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drop", default=SMOLLM2_12, help="for example attn:12, or attn=6,7,9")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="decode through torch.compile with a static cache")
    given = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    models = dense_and_pruned(given.model, given.drop)
    gpu = torch.cuda.is_available()
    here = None if gpu else measure_cpu()
    chosen = settings(given.quick, gpu)
    table = measure(models, chosen, given.repeats, compile=given.compile, seconds=25 if given.quick else None)
    print(table)
    guess = None
    if here is not None:
        print(f"{here.flops / 1e9:.0f} GFLOP/s, {here.bandwidth / 1e9:.1f} GB/s, copies {here.copy / 1e9:.1f} GB/s")
        guess = estimated(table, models, chosen[0], here)
        for kernels in KERNELS:
            speedup = guess.speedup(kernels)
            print(f"estimate, {kernels} kernels: prefill {speedup.prefill:.3f}x, decode {speedup.decode:.3f}x")
        prefill, decode = off(table.row("dense", chosen[0]), guess.dense.times["sdpa"], table.threads)
        print(f"the estimate's seconds, sdpa kernels, dense: prefill {prefill:+.0f}%, decode {decode:+.0f}% off")
    print(json.dumps(figures(table, guess, table.rows[0].setting)))


if __name__ == "__main__":
    main()
