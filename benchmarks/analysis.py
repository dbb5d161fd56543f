"""What scoring every layer costs on top of a forward pass of the trunk, the two interleaved.

    python benchmarks/analysis.py [--quick] [--model smollm2-135m] [--length 512] [--repeats 12]

One window passes the bare trunk and then the trunk with analysis of all three kinds (block, attention, MLP), in
changing order; the ratio is that of the fastest of each, its spread that of the medians of two halves.
CPU time is taken beside wall time: on a busy machine it is the one to read.  `--quick` takes a random
model of a smaller shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dropformer.metrics.analysis.analyze import measuring, proven, trunk

QUICK = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 9}


def model_of(name: str, quick: bool) -> Any:
    if quick:
        config = AutoConfig.for_model("llama", vocab_size=4096, num_key_value_heads=3, **QUICK)
        return AutoModelForCausalLM.from_config(config).eval()
    from dropformer import open_model

    return open_model(name).model


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall, and of this process's threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(model: Any, ids: torch.Tensor, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Times of each, `repeats` of both."""
    architecture, part = proven(model), trunk(model)

    def bare() -> None:
        with torch.inference_mode():
            part(input_ids=ids, use_cache=False)

    def scored() -> None:
        with measuring(model, architecture) as run:
            timings["analysis"].append(timed(lambda: run({"input_ids": ids}, None)))

    timings: dict[str, list[tuple[float, float]]] = {"bare": [], "analysis": []}
    for repeat in range(repeats + 1):
        for name in ("bare", "analysis") if repeat % 2 else ("analysis", "bare"):
            scored() if name == "analysis" else timings["bare"].append(timed(bare))
    return {name: values[1:] for name, values in timings.items()}  # the first of each warms up


def ratio(found: dict[str, list[tuple[float, float]]], clock: int) -> float:
    return min(t[clock] for t in found["analysis"]) / min(t[clock] for t in found["bare"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    model = model_of(options.model, options.quick)
    ids = torch.randint(3, 4000, (1, options.length), generator=torch.Generator().manual_seed(0)).to(model.device)
    found = compare(model, ids, options.repeats)
    medians = [
        statistics.median(a[1] / b[1] for a, b in zip(found["analysis"][half::2], found["bare"][half::2], strict=True))
        for half in (0, 1)
    ]
    bare = min(t[0] for t in found["bare"])
    print(f"bare trunk {bare:.3f} s for {options.length} tokens; with analysis {ratio(found, 0):.3f} x (wall)")
    print(
        f"CPU time: {ratio(found, 1):.3f} x; medians of paired ratios, two halves: {medians[0]:.3f}, {medians[1]:.3f}"
    )
    figures = {
        "benchmark": "analysis",
        "ratio": round(ratio(found, 1), 4),
        "ratio_wall": round(ratio(found, 0), 4),
        "spread": round(abs(medians[0] - medians[1]), 4),
        "tokens": options.length * options.repeats * 2,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
