"""What one GPU shows: memory, speed and 16 bits, with models of real shapes and random weights that it makes itself.

    python benchmarks/gpu.py [--gib 24] [--until 560] [--steps prune,analyze] [--lines gpu.jsonl]
    python benchmarks/gpu.py --rehearse        every step on this CPU, with models scaled to fit

Each step runs in a process of its own, under its own limit, and prints one JSON line: seconds, peak device and host
memory, figures, and under `holds` what was to be shown.  The processes are forked from one that has imported everything
and has not touched the device.  Steps are in order of worth: those for which no time is left
are said to be skipped.  Random weights prove speed, memory and plumbing, never quality.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULT = "RESULT "
LEAST = 10.0  # seconds below which no step is started
FORKS = multiprocessing.get_context("forkserver")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gib", type=float, help="cap the device's memory; `best` is capped at 24 and the tables at 80 in any case"
    )
    parser.add_argument("--until", type=float, default=560, metavar="SECONDS", help="for all steps together")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small models; no speed is judged")
    parser.add_argument("--steps", help="some of the steps, by commas")
    parser.add_argument("--lines", type=Path, help="a file that the lines are added to as well")
    parser.add_argument("--folder", type=Path, help="for models and outputs, 40 GB; default: a temporary one")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="dropformer-gpu-") as temporary:
        given.folder = given.folder or Path(temporary)
        given.folder.mkdir(parents=True, exist_ok=True)
        every(given)


def every(given: argparse.Namespace) -> None:
    """Run the steps one after another until the time is up, and print their lines and a last one that sums up."""
    from on_gpu.steps import STEPS

    if not given.rehearse:
        _need_gpu()
    names = given.steps.split(",") if given.steps else list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        sys.exit(f"there is no step {unknown[0]}; expected some of {', '.join(STEPS)}")
    FORKS.set_forkserver_preload(["dropformer.cli", "dropformer.job", "transformers", "on_gpu.steps"])
    start, lines = time.perf_counter(), []
    for name in names:
        left = given.until - (time.perf_counter() - start)
        limit = min(left, (6 if given.rehearse else 1) * STEPS[name][1])
        line = _run(given, name, limit) if left > LEAST else {"skipped": "no time left"}
        lines.append({"step": name, **line})
        _tell(given, lines[-1])
    wrong = [line["step"] for line in lines if "error" in line or not all(line.get("holds", {}).values())]
    skipped = [line["step"] for line in lines if "skipped" in line]
    total = round(time.perf_counter() - start, 1)
    _tell(given, {"benchmark": "gpu", "device": _device(given), "seconds": total, "wrong": wrong, "skipped": skipped})
    sys.exit(1 if wrong else 0)


def _need_gpu() -> None:
    import torch

    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # which leaves the device alone
    if not torch.cuda.is_available():
        sys.exit("no CUDA device is here; `--rehearse` runs every step on the CPU with small models")


def _device(given: argparse.Namespace) -> str:
    import torch

    return "cpu, a rehearsal" if given.rehearse else torch.cuda.get_device_name()


def _tell(given: argparse.Namespace, line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
    if given.lines:
        with given.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _run(given: argparse.Namespace, name: str, limit: float) -> dict[str, Any]:
    """One step in a process of its own, which is ended at its limit; the last lines of what it said where it failed."""
    start, log = time.perf_counter(), given.folder / f"{name}.log"
    process = FORKS.Process(target=one, args=(given, name, log))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    said = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    found = next((json.loads(line.removeprefix(RESULT)) for line in reversed(said) if line.startswith(RESULT)), None)
    if found is None:
        ended = f"ended with {process.exitcode}" if (process.exitcode or 0) >= 0 else f"was ended after {limit:.0f} s"
        found = {"error": f"the step {ended}"}
    if "error" in found or not all(found.get("holds", {}).values()):
        found["said"] = [line[:300] for line in said if not line.startswith(RESULT)][-8:]
    return {"seconds": round(time.perf_counter() - start, 1), **found}


def one(given: argparse.Namespace, name: str, log: Path) -> None:
    """In the step's own process: run it, and write its figures with the peaks of memory into its log."""
    import torch
    from on_gpu.steps import CAPS, GIB, STEPS, Bench

    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    device = torch.device("cpu" if given.rehearse else "cuda:0")
    if not given.rehearse:
        torch.cuda.init()  # peaks cannot be reset before the allocator exists
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        cap = min(given.gib or total, CAPS.get(name, total))
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)
    bench = Bench(device, given.rehearse, given.folder)
    try:
        found = STEPS[name][0](bench)
    except Exception as error:  # whatever it is: the other steps run
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    peaks = {"device_gib": round(bench.peak(), 2), "host_gib": round(_host_peak() / GIB, 2)}
    print(RESULT + json.dumps({"peak": peaks, **found}), flush=True)


def _host_peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
