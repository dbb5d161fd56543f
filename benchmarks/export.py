"""Exporting a checkpoint without some layers, against `cp` of files that hold the same kept bytes.

    python benchmarks/export.py [--quick] [--workdir DIR] [--gigabytes 6.5] [--repeats 5]

Makes a random sharded bfloat16 checkpoint with the names and shapes of Llama 3, drops attention and MLP
layers by name, and times in one interleaved run, each in a process of its own:

    cp           cp of the files that the export gives
    copy         open_checkpoint + copy_checkpoint with its sampled verification
    cp, sync     cp, then sync of those files
    export       the same inside new_folder, which waits for the disk
    command      the whole command, `prune --plan`: plan, copy, config, record; it waits for the disk too
    link         copy_checkpoint(link=True): unchanged shards are hard links

Before each, everything is flushed, all files leave the page cache, and those about to be read are read in.
`ratio_to_cp` is copy / cp, `ratio_durable` is export / (cp, sync): medians over pairs that ran one after the
other; a spread is the range of the middle half of the pairs. On a busy machine read `best_ratio` (fastest by
fastest) and `cpu_ratio` (processor time), which other programs disturb least. Needs free disk space of three
times the checkpoint, and removes what it made.

Where `mergekit-yaml` is on the PATH (`pip install mergekit` in an environment of its own), its passthrough of
the same checkpoint without one block is timed once (its start included), against cp at as many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropformer.prune.choosing import choose
from dropformer.prune.files import copy_checkpoint, new_folder, open_checkpoint
from dropformer.prune.files.safetensors_header import byte_size, encode_header
from dropformer.prune.plan import Plan, make_plan

MIB = 2**20
DROPPED = re.compile(r"model\.layers\.([6789]\.(self_attn|input_layernorm)|[78]\.(mlp|post_attention\w+))\..*")
SPEC = "attn=6,7,8,9,mlp=7,8"
PAIRS = {"copy": "cp", "export": "cp, sync"}


@dataclass(frozen=True)
class Run:
    """One timed process: wall and processor seconds, and its peak of resident memory."""

    seconds: float
    cpu: float
    peak_mib: float


def rename(name: str) -> str | None:
    return None if DROPPED.fullmatch(name) else name


def block_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """One block of Llama 3: grouped-query attention (4 query heads a key head), gated MLP 3.5 times as wide."""
    wide, narrow = 7 * hidden // 2, hidden // 4
    return {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, wide),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
    }


def make_checkpoint(folder: Path, hidden: int, total: int) -> None:
    """Blocks of random bfloat16 until there are `total` bytes, one shard for every two or three blocks."""
    block = {name: byte_size("BF16", shape) for name, shape in block_shapes(hidden).items()}
    count = max(10, -(-total // sum(block.values())))
    shapes = [{f"model.layers.{i}.{name}": shape for name, shape in block_shapes(hidden).items()} for i in range(count)]
    shapes[0]["model.embed_tokens.weight"] = (8 * hidden, hidden)
    shapes[-1]["model.norm.weight"] = (hidden,)
    groups = [dict(item for group in shapes[i : i + 3] for item in group.items()) for i in range(0, count, 3)]
    placed = {}
    for number, group in enumerate(groups, start=1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_shard(folder / shard, group, seed=number)
        placed |= dict.fromkeys(group, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": count}
    sizes = {"hidden_size": hidden, "intermediate_size": 7 * hidden // 2, "vocab_size": 8 * hidden}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | sizes | heads | {"tie_word_embeddings": True}))


def plan_of(folder: Path) -> Plan:
    """The plan that drops what DROPPED names, from the headers of the checkpoint."""
    from dropformer.prune.discovery.discover import discover
    from dropformer.prune.discovery.summarize import summarize
    from dropformer.prune.formats.export import reference
    from dropformer.prune.loading.load import weightless

    model = weightless(folder)
    outline = summarize(model, discover(model))
    layers = choose(outline, SPEC)
    return make_plan(outline, reference(str(folder), folder), SPEC, layers)


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    noise = memoryview(random.Random(seed).randbytes(16 * MIB))
    with path.open("wb") as file:
        file.write(encode_header([(name, "BF16", shape) for name, shape in shapes.items()], {"format": "pt"}))
        for shape in shapes.values():
            left = byte_size("BF16", shape)
            while left:
                left -= file.write(noise[: min(left, len(noise))])


def copy_once(mode: str, source: Path, out: Path) -> None:
    """What a process of ours does: copy, and print its own figures."""
    if mode == "plan":
        (out / "plan.json").write_text(plan_of(source).to_json())
        return
    began, busy = time.perf_counter(), time.process_time()
    checkpoint = open_checkpoint(source)
    if mode == "export":
        with new_folder(out) as folder:
            copy_checkpoint(checkpoint, folder, rename)
    else:
        copy_checkpoint(checkpoint, out, rename, link=mode == "link")
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy
    status = Path("/proc/self/status").read_text()
    peak = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mib": peak}))


def time_ours(mode: str, source: Path, out: Path) -> Run:
    command = [sys.executable, __file__, "--worker", mode, str(source), str(out)]
    return Run(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def time_command(command: list[str]) -> Run:
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def time_cp(files: Path, out: Path, wait: bool) -> Run:
    out.mkdir()
    paths = [str(path) for path in sorted(files.iterdir())]
    copies = [str(out / path.name) for path in sorted(files.iterdir())]
    script = 'cp -- "${@:3:$1}" "$2"' + (' && sync -- "${@:3+$1}"' if wait else "")
    return time_command(["bash", "-c", script, "bash", str(len(paths)), str(out), *paths, *copies])


def same_cache(folders: list[Path], wanted: Path) -> None:
    """Flush everything, forget all files, read in the wanted ones."""
    os.sync()
    for path in (path for folder in folders for path in folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while path.parent == wanted and file.read(MIB):
                pass


def one_run(mode: str, work: Path) -> Run:
    source, kept, out = work / "source", work / "kept", work / "out"
    same_cache([source, kept], kept if mode.startswith("cp") else source)
    try:
        if mode.startswith("cp"):
            return time_cp(kept, out, wait=mode == "cp, sync")
        if mode == "command":
            options = ["--model", source, "--plan", work / "plan.json", "--out", out, "--quiet"]
            return time_command([sys.executable, "-m", "dropformer", *map(str, options)])
        return time_ours(mode, source, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def middle_half(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def fastest(runs: list[Run]) -> float:
    return min(run.seconds for run in runs)


def measure(work: Path, repeats: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {mode: [] for pair in PAIRS.items() for mode in pair} | {"command": [], "link": []}
    # In a process of its own: what it imports would count as the peak of every process that this one starts.
    subprocess.run([sys.executable, __file__, "--worker", "plan", str(work / "source"), str(work)], check=True)
    for repeat in range(repeats):
        for ours, theirs in PAIRS.items():
            for mode in (ours, theirs) if repeat % 2 else (theirs, ours):
                runs[mode].append(one_run(mode, work))
        for mode in ("command", "link"):
            runs[mode].append(one_run(mode, work))
        print(" ".join(f"{mode} {each[-1].seconds:.2f} s;" for mode, each in runs.items()), flush=True)
    return runs


def figures(runs: dict[str, list[Run]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (ours, theirs), name in zip(PAIRS.items(), ("to_cp", "durable"), strict=True):
        pairs = list(zip(runs[ours], runs[theirs], strict=True))
        ratios = [mine.seconds / cp.seconds for mine, cp in pairs]
        found[f"ratio_{name}"] = round(statistics.median(ratios), 3)
        found[f"spread_{name}"] = round(middle_half(ratios), 3)
        found[f"best_ratio_{name}"] = round(fastest(runs[ours]) / fastest(runs[theirs]), 3)
        found[f"cpu_ratio_{name}"] = round(statistics.median(mine.cpu / cp.cpu for mine, cp in pairs), 3)
    for mode, each in runs.items():
        found[f"seconds_{mode.replace(', ', '_')}"] = round(statistics.median(run.seconds for run in each), 3)
    ours = [run.peak_mib for mode in ("copy", "export", "link") for run in runs[mode]]
    command = max(run.peak_mib for run in runs["command"])
    return found | {"peak_rss_mib": round(max(ours), 1), "peak_rss_command_mib": round(command, 1)}


def mergekit(work: Path, cp_seconds_per_byte: float) -> dict[str, float]:
    """mergekit's passthrough without the last block but one, against cp at as many bytes; empty if not installed."""
    if not shutil.which("mergekit-yaml"):
        return {}
    count = json.loads((work / "source" / "config.json").read_text())["num_hidden_layers"]
    ranges = [[0, count - 2], [count - 1, count]]
    slices = [{"sources": [{"model": str(work / "source"), "layer_range": each}]} for each in ranges]
    recipe = {"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}
    (work / "passthrough.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    same_cache([work / "source", work / "kept"], work / "source")
    command = ["mergekit-yaml", str(work / "passthrough.yaml"), str(work / "out"), "--no-copy-tokenizer"]
    run = time_command(command)
    size = sum(path.stat().st_size for path in (work / "out").glob("*.safetensors"))
    shutil.rmtree(work / "out")
    return {
        "mergekit_seconds": round(run.seconds, 2),
        "mergekit_to_cp": round(run.seconds / cp_seconds_per_byte / size, 3),
    }


def benchmark(work: Path, hidden: int, total: int, repeats: int) -> dict[str, Any]:
    (work / "source").mkdir()
    make_checkpoint(work / "source", hidden, total)
    checkpoint = open_checkpoint(work / "source")
    report = copy_checkpoint(checkpoint, work / "kept", rename, verify="all")
    print(
        f"{checkpoint.nbytes / 1e9:.2f} GB in {len(checkpoint.shards)} shards; kept {report.bytes_kept / 1e9:.2f} GB, "
        f"dropped {report.tensors_dropped} tensors of {len(checkpoint.tensors)}",
        flush=True,
    )
    found = figures(measure(work, repeats))
    if total >= 1e9:  # below, its start would be all there is to measure
        found |= mergekit(work, found["seconds_cp"] / report.bytes_kept)
    print(
        f"copy / cp {found['ratio_to_cp']} (spread {found['spread_to_cp']}), of the fastest "
        f"{found['best_ratio_to_cp']}, of processor time {found['cpu_ratio_to_cp']}; peak {found['peak_rss_mib']} MiB; "
        f"the whole command peaks at {found['peak_rss_command_mib']} MiB"
    )
    return {"source_bytes": checkpoint.nbytes, "kept_bytes": report.bytes_kept, "repeats": repeats, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.2 GB")
    parser.add_argument("--workdir", type=Path, help="where the files go [the system's temporary folder]")
    parser.add_argument("--gigabytes", type=float, default=6.5)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        mode, source, out = options.worker
        return copy_once(mode, Path(source), Path(out))
    hidden, gigabytes, repeats = (1024, 0.2, 5) if options.quick else (4096, options.gigabytes, 5)
    with tempfile.TemporaryDirectory(prefix="dropformer-export-", dir=options.workdir) as work:
        found = benchmark(Path(work), hidden, int(gigabytes * 1e9), options.repeats or repeats)
    print(json.dumps({"benchmark": "export", **found}))
    return None


if __name__ == "__main__":
    main()
