"""Agent attention and drops in a ViT, against the dense model: time, memory, FLOPs and outputs at several image sizes.

    python benchmarks/vision.py [--quick] [--sizes 224,1024] [--blocks 2] [--drops 'attn=1 agent=1@49 agent=0,1@49']
        [--repeats 3] [--digits]

ViT-base's width with fewer blocks and random weights: what is measured is cost and that outputs are written as planned,
never quality. Dense and pruned models run in turn, one image each; CPU time is to be read on a busy machine. Memory is
what one forward pass adds to what is resident. `--digits` trains a small ViT on scikit-learn's 1,797 handwritten digits
(two minutes) and gives the accuracy that each rung leaves on those that were not trained on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

import dropformer
from dropformer.api import outline, plan_unscored
from dropformer.eval.cost.counting import cost_of_config
from dropformer.eval.cost.estimate import forward_estimate
from dropformer.eval.cost.hardware import HARDWARE
from dropformer.metrics.analysis.agent_loss import agent_losses
from dropformer.metrics.offload.process_memory import PeakMemory
from dropformer.prune.artifact import ModelRef
from dropformer.prune.outline import Outline
from dropformer.prune.spec import parse_spec

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
DIGITS = {**TINY, "num_hidden_layers": 6, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}


def vit(size: int, blocks: int, **fields: Any) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(image_size=size, num_hidden_layers=blocks, num_labels=1000, **fields)
    config.architectures = ["ViTForImageClassification"]
    return ViTForImageClassification(config).eval()


def pruned(model: Any, spec: str, batches: list[dict[str, torch.Tensor]], anatomy: Outline) -> Any:
    """The model after a drop spec of one item; layers that it does not name are ranked as `prune` ranks them."""
    (item,) = parse_spec(spec)
    if item.rung or item.indices:
        losses = agent_losses(model, anatomy, batches, item.rung) if item.indices is None else None  # type: ignore
        plan = plan_unscored(ModelRef(name="vit", model_type="vit"), anatomy, spec, (), None, losses)
    else:
        plan = dropformer.plan(dropformer.analyze(model, batches), spec)
    return dropformer.drop(model, plan)


def cost_at(size: int, specs: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the dense model and each spec at one image size."""
    model = vit(size, args.blocks, **(TINY if args.quick else {}))
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    counted = cost_of_config(model.config)  # traced without weights, at any image size
    models = {"dense": model} | {spec: pruned(model, spec, [], counted.outline) for spec in specs}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    outputs, peaks = {}, {}
    with torch.inference_mode():
        for name, each in models.items():
            memory = PeakMemory()
            outputs[name] = each(pixels).logits
            peaks[name] = memory.extra
        for repeat in range(args.repeats):
            for name in list(models)[:: 1 if repeat % 2 else -1]:
                wall, cpu = time.perf_counter(), time.process_time()
                models[name](pixels)
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows = []
    for name in models:
        found = forward_estimate(counted, "" if name == "dense" else name, HARDWARE["a100-80g"])
        wall, cpu = (statistics.median(column) for column in zip(*seconds[name], strict=True))
        rows.append(
            {
                "pixels": size, "tokens": found.dense.tokens, "model": name, "wall_s": round(wall, 4),
                "cpu_s": round(cpu, 4), "gflop": round(found.pruned.flops / 1e9, 4),
                "peak_mib": round(peaks[name] / 2**20, 1),
                "cosine": round(float(F.cosine_similarity(outputs["dense"], outputs[name]).mean()), 4),
            }
        )  # fmt: skip
    for row in rows:
        row["speedup"] = round(rows[0]["cpu_s"] / row["cpu_s"], 2)
        row["flops_allow"] = round(rows[0]["gflop"] / row["gflop"], 2)
    return rows


def digits(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy of a small ViT that was trained, dense and pruned without any repair."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images).float()[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    torch.manual_seed(0)
    model = trained(ViTForImageClassification(ViTConfig(**DIGITS)), images[train], labels[train], args.epochs)
    batches = [{"pixel_values": images[part]} for part in train[:256].split(64)]
    rows, anatomy = [], outline(model)
    for spec in ("", "attn:1", "attn:2", "attn:4", "agent:2@4", "agent:4@4", "agent:6@4", "agent:6@1"):
        each = pruned(model, spec, batches, anatomy) if spec else model
        with torch.inference_mode():
            right = (each(images[test]).logits.argmax(-1) == labels[test]).float().mean()
        rows.append({"model": spec or "dense", "accuracy": round(float(right), 4)})
        print(f"digits, 17 tokens: {spec or 'dense':12} accuracy {float(right):.1%}", flush=True)
    return rows


def trained(model: Any, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> Any:
    draw, steps = torch.Generator().manual_seed(0), epochs * (len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(images), generator=draw)[: len(images) // 64 * 64].split(64):
            loss = F.cross_entropy(model(images[part]).logits, labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sizes", default="224,1024")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--drops", default="attn=1 agent=1@49 agent=0,1@49")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--digits", action="store_true")
    args = parser.parse_args()
    if args.digits:
        print(json.dumps({"benchmark": "vision", "digits": digits(args)}))
        return
    sizes = [64, 256] if args.quick else [int(size) for size in args.sizes.split(",")]
    rows = []
    for size in sizes:
        for row in cost_at(size, args.drops.split(), args):
            rows.append(row)
            print(
                f"{size} pixels, {row['tokens']:,} tokens: {row['model']:12} {row['cpu_s']:.3f} s of CPU "
                f"({row['wall_s']:.3f} s), {row['speedup']:.2f}x, FLOPs allow {row['flops_allow']:.2f}x, "
                f"{row['peak_mib']:.0f} MiB, cosine of the logits {row['cosine']:.4f}",
                flush=True,
            )
    print("random weights: cost and plumbing, never quality")
    print(json.dumps({"benchmark": "vision", "blocks": args.blocks, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
