"""The steps of `gpu.py`, in order of worth: each returns what it measured, and under `holds` what was to be shown."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from on_gpu.models import byte_tokenizer, in_memory, on_disk, shape
from torch import nn

GIB = 2**30
BEST_GIB = 24.0  # the card on which the best quality must run for an 8B model
COMPILED = 12  # blocks
PAPER_GIB = 79.0  # the paper's card has 80 GB
CAPS = {"best": BEST_GIB, "table-13b": PAPER_GIB, "table-mistral": PAPER_GIB}
Figures = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where steps run: `small` models on a CPU are a rehearsal, of which no speed is judged.  `folder`: for files."""

    device: torch.device
    small: bool
    folder: Path

    def layers(self, count: int) -> int:
        """As many layers as in a model with all of its own, or their share of a quarter of them."""
        return max(1, count // 4) if self.small else count

    def sized(self, real: int, small: int) -> int:
        return small if self.small else real

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def peak(self) -> float:
        """GiB on the device at the peak so far."""
        return torch.cuda.max_memory_allocated(self.device) / GIB if self.device.type == "cuda" else 0.0


def tests(bench: Bench) -> Figures:
    """`pytest -m gpu`; in a rehearsal what of it a CPU can do."""
    import os

    import pytest

    os.environ["DROPFORMER_TEST_DEVICE"] = str(bench.device)
    tests = Path(__file__).resolve().parents[2] / "tests"
    status = pytest.main(
        [
            "-q",
            "-m",
            "gpu",
            "-rs",
            "-W",
            "ignore",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:logging",
            str(tests / "test_gpu.py"),
        ]
    )
    return {"holds": {"tests pass": int(status) == 0}}


def command(bench: Bench, name: str, drop: str, *options: str) -> Figures:
    """The `prune` command on a model's files, report and verification included."""
    from dropformer.cli import main

    start = time.perf_counter()
    path = on_disk(name, bench.folder, bench.device, bench.small)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
    made, out = time.perf_counter() - start, bench.folder / "out" / f"{name}-{len(list(bench.folder.glob('out/*')))}"
    window = ["--length", str(bench.sized(512, 32)), "--seconds", str(bench.sized(5, 1))]
    device = ["--device", str(bench.device), "--dtype", "bfloat16"]
    sys.argv = ["prune", "-m", str(path), "-d", drop, "--out", str(out), *window, *device, *options]
    said, start = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(said):
        try:
            main()
        except SystemExit as end:
            status = end.code
    print(said.getvalue())
    weights = sum(p.stat().st_size for p in path.glob("*.safetensors")) / GIB
    record = json.loads((out / "dropformer.json").read_text()) if out.exists() else {}
    return {
        "command": f"prune -d {drop} {' '.join(options)}".strip(),
        "seconds_making": round(made, 1),
        "seconds_command": round(time.perf_counter() - start, 1),
        "weights_gib": round(weights, 2),
        "beside_weights_gib": round(bench.peak() - weights, 2),
        "repairs": record.get("repairs", []),
        "dropped": record.get("dropped"),
        "holds": {"ends well": status in (0, None), "verified": "logits equal" in said.getvalue()},
    }


def prune(bench: Bench) -> Figures:
    """8B: `prune --drop attn:8` whole."""
    return command(bench, "llama-3-8b", f"attn:{bench.layers(8)}", "--samples", str(bench.sized(32, 2)))


def analyze(bench: Bench) -> Figures:
    """8B: the analysis at batch 1 and 8 beside a bare forward pass; goal 1.05."""
    from dropformer.metrics.analysis.analyze import as_inputs, measuring, proven, trunk
    from dropformer.metrics.calibration.settings import Calibration
    from dropformer.metrics.calibration.windows import windows

    model = in_memory("llama-3-8b", bench.device, bench.small)
    data = windows(Calibration("builtin", bench.sized(32, 8), bench.sized(512, 16)), byte_tokenizer())
    architecture, part = proven(model), trunk(model)
    found: Figures = {}
    for size in (1, 8):

        def bare(size: int = size) -> None:
            with torch.inference_mode():
                for inputs, _ in data.batches(size):
                    part(**as_inputs(part, inputs))

        def scored(size: int = size) -> None:
            with measuring(model, architecture) as run:
                for inputs, mask in data.batches(size):
                    run(inputs, mask)

        bare(), scored()
        pairs = [(bench.seconds(scored), bench.seconds(bare)) for _ in range(bench.sized(3, 1))]
        found[f"batch_{size}"] = {
            "ratio": round(statistics.median(one / two for one, two in pairs), 3),
            "tokens_per_second": round(data.ids.numel() / min(one for one, _ in pairs)),
        }
    close = all(found[f"batch_{size}"]["ratio"] <= 1.05 for size in (1, 8))
    return {**found, "holds": {} if bench.small else {"within 1.05 of a bare forward pass": close}}


def best(bench: Bench) -> Figures:
    """8B: `--quality best --samples 16` within 24 GiB."""
    drop = f"attn:{bench.layers(8)}"
    found = command(bench, "llama-3-8b", drop, "--quality", "best", "--samples", str(bench.sized(16, 4)))
    found["holds"]["within 24 GiB"] = bench.peak() <= BEST_GIB
    return found


def repaired(bench: Bench, way: str) -> Figures:
    """8B: one repair by its name, where this version has it."""
    from dropformer.metrics.search.strategy import REPAIRS

    if way not in REPAIRS:
        return {"skipped": f"there is no --repair {way}", "holds": {}}
    drop = f"attn:{bench.layers(8)}"
    return command(bench, "llama-3-8b", drop, "--repair", way, "--samples", str(bench.sized(16, 4)))


def small(bench: Bench, name: str) -> Figures:
    """A small model of another family, pruned and repaired."""
    return command(bench, name, "attn:1,mlp:1", "--repair", "refit", "--samples", str(bench.sized(16, 4)))


def table(bench: Bench, name: str, counts: Iterable[int]) -> Figures:
    """The paper's table: 2,048 tokens in and 2,048 out at the largest batch, beside the published speed-ups.

    A prefill of 2,048 tokens, and the decode steps half-way, whose time is the mean of all: it grows linearly.
    """
    from dropformer.eval.cost.largest_batch import with_batch
    from dropformer.eval.cost.speed import PAPER, Setting, measure
    from dropformer.recipes import recipes

    prompt, new = bench.sized(PAPER.prompt, 16), bench.sized(PAPER.new, 16)
    models = dense_and_pruned(bench, name, counts)
    whole = Setting(prompt, new, "max" if bench.device.type == "cuda" else 2)
    batch = with_batch(models, whole).batch
    steps = bench.sized(32, 4)
    half = Setting(prompt + new // 2 - steps // 2, steps, batch)
    rows = measure(models, [Setting(prompt, 1, batch), half], repeats=2, seconds=bench.sized(40, 5))
    seconds = {
        key: batch * prompt / rows.row(key).prefill.median + batch * new / rows.row(key, half).decode.median
        for key in models
    }
    estimates = estimated(bench, name, counts, Setting(prompt, new, batch))
    found, close = {}, {}
    for count in counts:
        ratio = seconds["dense"] / seconds[f"attn:{count}"]
        published = next((r.speedup for r in recipes()[name].results if r.drop == f"attn:{count}"), None)
        guess = estimates.get(count)
        found[f"attn:{count}"] = {"measured": round(ratio, 3), "paper": published, "estimate": guess}
        if guess is not None:
            close[f"attn:{count} within 0.05 of the estimate"] = abs(ratio - guess) <= 0.05
    return {"batch": batch, "dense_seconds": round(seconds["dense"], 2), **found, "holds": close}


def estimated(bench: Bench, name: str, counts: Iterable[int], setting: Any) -> dict[int, float]:
    """What `prune estimate` says of this card, transformers' kernels; nothing for a card that it does not know."""
    from dropformer.eval.cost.estimate import estimate
    from dropformer.eval.cost.hardware import HARDWARE
    from dropformer.eval.cost.roofline import Workload

    card = torch.cuda.get_device_name(bench.device).lower() if bench.device.type == "cuda" else ""
    known = next((h for key, h in HARDWARE.items() if key.split("-")[0] in card.replace(" ", "")), None)
    if known is None:
        return {}
    workload = Workload(setting.prompt + setting.new, setting.batch, setting.new)
    guesses = {n: estimate(shape(name, bench.small), f"attn:{n}", known, workload) for n in counts}
    return {n: round(guess.speedup("sdpa").generation, 3) for n, guess in guesses.items()}


def dense_and_pruned(bench: Bench, name: str, counts: Iterable[int], blocks: int | None = None) -> dict[str, nn.Module]:
    """A model (of `blocks` blocks) and copies without attention layers, from the last but one up; weights held once."""
    from dropformer import api
    from dropformer.prune.artifact import ModelRef

    dense = in_memory(name, bench.device, bench.small, blocks)
    outline, last = api.outline(dense), dense.config.num_hidden_layers - 1
    found: dict[str, nn.Module] = {"dense": dense}
    for count in counts:
        spec = "attn=" + ",".join(str(last - 1 - i) for i in range(bench.layers(count)))
        found[f"attn:{count}"] = api.drop(dense, api.plan_unscored(ModelRef(name=name), outline, spec, (), None))
    return found


def compiled(bench: Bench) -> Figures:
    """12 blocks of an 8B model (32 compile for minutes): decode through torch.compile against its bound; goal 0.95."""
    from dropformer.eval.cost.speed import Setting, measure

    models = dense_and_pruned(bench, "llama-3-8b", [3], COMPILED)
    setting = Setting(bench.sized(512, 16), bench.sized(64, 4), 1)
    rows = measure(models, [setting], repeats=bench.sized(3, 1), compile=not bench.small)
    pruned = rows.row("attn:3")
    share = pruned.decode_ratio.median / pruned.bound_decode
    return {
        "decode_ratio": round(pruned.decode_ratio.median, 3),
        "bound": round(pruned.bound_decode, 3),
        "share": round(share, 3),
        "tokens_per_second": round(rows.row("dense").decode.median, 1),
        "holds": {} if bench.small else {"0.95 of its bound": share >= 0.95},
    }


STEPS: dict[str, tuple[Callable[[Bench], Figures], int]] = {  # what it does, and its limit in seconds
    "tests": (tests, 90),
    "prune": (prune, 100),
    "analyze": (analyze, 45),
    "best": (best, 120),
    "linear": (partial(repaired, way="linear"), 80),
    "distill": (partial(repaired, way="distill"), 80),
    "mixture": (partial(small, name="mixture"), 45),
    "gemma": (partial(small, name="gemma"), 45),
    "table-13b": (partial(table, name="llama-2-13b", counts=(4, 8, 16, 20)), 140),
    "table-mistral": (partial(table, name="mistral-7b", counts=(8, 12)), 60),
    "compile": (compiled, 90),
}
