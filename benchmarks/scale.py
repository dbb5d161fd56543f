"""What choosing and repairing costs, in forward passes over the calibration and in memory, and how that grows.

    python benchmarks/scale.py [--quick]            random Llamas on this machine
    python benchmarks/scale.py --table              8B, 13B and 70B on GPUs, by the formula

Random Llamas of width 1,024 and 2,048 with 4 and 8 blocks, MLP 3.5 times as wide, each in a process of its own:
`--quality best` of two attention layers, and the refits of a given plan.  Passes are counted by the
engine; memory is what the process takes beyond the model's weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HOLD = 64  # MiB of streams and changes in memory, the rest in files


@dataclass(frozen=True)
class Setting:
    """One model and its calibration."""

    width: int
    blocks: int
    windows: int
    length: int


@dataclass(frozen=True)
class Cost:
    """Forward passes and MiB beyond the weights."""

    passes_best: float
    passes_refit: float
    extra_mib: float
    weights_mib: float


def measure(setting: Setting) -> Cost:
    """Build the model, choose and repair, and refit a given plan."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dropformer.metrics.calibration.settings import CalibrationRef
    from dropformer.metrics.calibration.windows import Windows
    from dropformer.metrics.offload.keeper import Keeper
    from dropformer.metrics.offload.process_memory import PeakMemory
    from dropformer.metrics.search.improve import Improver, improve
    from dropformer.metrics.search.strategy import Target, quality
    from dropformer.prune.artifact import ModelRef

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=setting.width, intermediate_size=int(3.5 * setting.width), num_hidden_layers=setting.blocks,
        num_attention_heads=setting.width // 64, num_key_value_heads=setting.width // 256, vocab_size=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 512, (setting.windows, setting.length), generator=torch.Generator().manual_seed(0))
    every = torch.ones_like(ids, dtype=torch.bool)
    half, ref = setting.windows // 2, CalibrationRef(
        name="random", samples=setting.windows // 2, length=setting.length, seed=0, packed=True, skip_first=0, hash="0"
    )  # fmt: skip
    data = [Windows(part, every[:half], every[:half], ref) for part in (ids[:half], ids[half:])]

    def run(name: str, spec: str) -> tuple[float, int]:
        memory = PeakMemory()
        found = Improver(model, data, quality(repair="refit") if name == "refit" else quality(name), keeper=keeper())
        improve(found, ModelRef(name="random"), Target(spec), data[0])
        return found.work.passes, memory.extra

    def keeper() -> Keeper:
        return Keeper(host=HOLD << 20)

    run("refit", "attn=1")  # libraries load what they need
    best, extra = run("best", "attn:2")
    refit, _ = run("refit", f"attn={setting.blocks - 2},{setting.blocks - 1}")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Cost(round(best, 2), round(refit, 2), round(extra / 2**20, 1), round(weights / 2**20, 1))


def in_child(setting: Setting) -> Cost:
    """Measure in a process of its own, so that no other's memory counts."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(setting))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one width, few tokens, within a minute")
    parser.add_argument("--table", action="store_true", help="costs of 8B, 13B and 70B by the formula, as Markdown")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    said = parser.parse_args(arguments)
    if said.child:
        print(json.dumps(asdict(measure(Setting(**json.loads(said.child))))))
        return
    if said.table:
        sys.path.append(str(Path(__file__).parent))
        from on_gpu.scale_table import table

        print(table())
        return
    widths, shape = ([512], (12, 48)) if said.quick else ([1024, 2048], (16, 128))
    costs: dict[tuple[int, int], Cost] = {}
    for width in widths:
        for blocks in (4, 8):
            cost = costs[width, blocks] = in_child(Setting(width, blocks, *shape))
            print(
                f"width {width}, {blocks} blocks ({cost.weights_mib:.0f} MiB): best {cost.passes_best:.2f} passes, "
                f"refit {cost.passes_refit:.2f}; {cost.extra_mib:.0f} MiB beyond the weights",
                flush=True,
            )
    growth = max((costs[width, 8].extra_mib - costs[width, 4].extra_mib) / 4 for width in widths)
    summary = {
        "benchmark": "scale",
        "passes_best": max(cost.passes_best for cost in costs.values()),
        "passes_refit": max(cost.passes_refit for cost in costs.values()),
        "extra_mib": max(cost.extra_mib for cost in costs.values()),
        "extra_mib_per_block": round(growth, 2),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
