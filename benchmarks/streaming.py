"""Analyze a checkpoint that is larger than the memory allowed: peak memory, bytes read, and time.

    python benchmarks/streaming.py [--quick] [--memory 2GiB] [--windows 4] [--folder DIR]

Makes a random Llama-shaped checkpoint in bfloat16 shards (6.5 GB; `--quick`: 0.2 GB), reads its files once
plainly, and then analyzes it in a process of its own, which alone is measured.  Before each the files are dropped
from the system's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

SHARD = 1 << 30
FULL = {"hidden_size": 2560, "intermediate_size": 8704, "num_hidden_layers": 36, "num_attention_heads": 20}
QUICK = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12}


def config(quick: bool) -> PreTrainedConfig:
    shape = QUICK if quick else FULL
    heads = shape["num_attention_heads"] // 4
    return AutoConfig.for_model("llama", vocab_size=4096 if quick else 32000, num_key_value_heads=heads, **shape)


def make(folder: Path, quick: bool) -> None:
    """Random weights, written shard by shard so that making them takes little memory either."""
    model_config = config(quick)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model_config)
    model_config.architectures = [type(empty).__name__]
    model_config.save_pretrained(folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}

    def write() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for name, tensor in empty.state_dict().items():
        if sum(t.nbytes for t in shards[-1].values()) > SHARD // (8 if quick else 1):
            write()
            shards.append({})
        shards[-1][name] = random_weight(tensor.shape)
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


@cache
def noise() -> torch.Tensor:
    """Random numbers to cut weights from; a prime number of them, so that rows are not alike."""
    return (torch.randn(2_097_143, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def random_weight(shape: torch.Size) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return noise().repeat(-(-shape.numel() // len(noise())))[: shape.numel()].view(shape).clone()


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its cache, so that both readers start from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def system_bytes() -> int:
    """Bytes that this process has asked the system to read, by its own count (Linux; elsewhere 0)."""
    counts = Path("/proc/self/io")
    return int(counts.read_text().split("rchar:")[1].split()[0]) if counts.exists() else 0


def read_plainly(folder: Path) -> float:
    """Seconds to read all files once."""
    start, buffer = time.perf_counter(), bytearray(8 << 20)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def analyze(folder: Path, windows: int, length: int, memory: int) -> dict[str, float]:
    """Stream random windows through the checkpoint; the figures of this process."""
    from dropformer.metrics.calibration.settings import CalibrationRef
    from dropformer.metrics.calibration.windows import Windows
    from dropformer.metrics.offload.process_memory import peak
    from dropformer.metrics.offload.streaming import open_streamed, stream

    ids = torch.randint(3, 4096, (windows, length), generator=torch.Generator().manual_seed(0))
    fields: dict[str, Any] = {"samples": windows, "length": length, "seed": 0, "packed": True, "skip_first": 0}
    scored = torch.ones_like(ids).bool()
    data = Windows(ids, scored, scored, CalibrationRef(name="random", hash="0", **fields))
    start = time.perf_counter()
    streamed = open_streamed(folder)
    before = system_bytes()
    rows = stream(streamed, data, list(range(windows)), 1, memory)
    seconds, asked = time.perf_counter() - start, system_bytes() - before
    assert torch.isfinite(rows.sums).all()
    read, nbytes = streamed.weights.bytes_read, streamed.weights.checkpoint.nbytes
    return {"seconds": seconds, "peak_rss": peak(), "bytes_read": read, "asked": asked, "checkpoint": nbytes}


def main() -> None:
    from dropformer.metrics.offload.process_memory import parse_bytes, shown

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", help="default: 2GiB, quick: 700MiB")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint (default: a temporary folder)")
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    memory = parse_bytes(options.memory or ("700MiB" if options.quick else "2GiB"))
    if options.measured:
        print(json.dumps(analyze(options.measured, options.windows, options.length, memory)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        make(Path(name), options.quick)
        forget(Path(name))
        plain = read_plainly(Path(name))
        forget(Path(name))
        command = [sys.executable, __file__, "--measured", name, "--memory", str(memory)]
        command += ["--windows", str(options.windows), "--length", str(options.length)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"checkpoint {shown(found['checkpoint'])}, budget {shown(memory)}, peak {shown(found['peak_rss'])}")
    print(
        f"read {found['bytes_read'] / found['checkpoint']:.3f} of it (by the system's count of all reads "
        f"{found['asked'] / found['checkpoint']:.3f}) in {found['seconds']:.1f} s; plainly {plain:.2f} s"
    )
    figures = {
        "benchmark": "streaming",
        "checkpoint_mib": found["checkpoint"] >> 20,
        "peak_rss_mib": found["peak_rss"] >> 20,
        "budget_mib": memory >> 20,
        "bytes_read_ratio": round(found["bytes_read"] / found["checkpoint"], 4),
        "system_read_ratio": round(found["asked"] / found["checkpoint"], 4),
        "seconds": round(found["seconds"], 1),
        "plain_read_seconds": round(plain, 2),
        "tokens": options.windows * options.length,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
