"""Attention windows in place of drops, at length: what the KV cache shrinks to, and what that costs.

    python benchmarks/ladder.py [--quick] [--model smollm2-135m] [--text heldout] [--length 8192] [--texts 2]
        [--rungs window:256+4,window:512+4,...] [--read 2] [--shares 0.5,0.3333,0.25] [--plans FILE] [--choose]
        [--beside bytes,speed] [--samples 24]

For each share of the cache of `--length` tokens, rungs are chosen as `--budget kv:-50% --rungs` does, on `--read`
texts of that length. `--plans` keeps what was chosen, and reads it where the file exists; `--choose` stops there. Dense
and windowed models read the same texts: perplexity over dense at positions beyond 1,024 (an eighth of the length where
that is shorter), facts from five depths, and decode speed behind the text, models in turn, beside what the bytes of
weights and cache allow. `--beside` adds attention layers dropped by `--quality best` on `--samples` windows: as few as
save the same bytes of the cache (`bytes`), or as bring the same speed-up of decoding by bytes (`speed`). At equal speed
the windows are to lose a tenth of the log perplexity at most.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import dropformer
from dropformer import api
from dropformer.eval.cost.counting import cost_of
from dropformer.eval.cost.decoding import decode_behind
from dropformer.eval.cost.model_cost import ModelCost
from dropformer.eval.quality.long_context import ask, band, needle, read, text_tokens, with_facts
from dropformer.metrics.calibration.far_recall import far_recall
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import windows
from dropformer.metrics.offload.process_memory import peak
from dropformer.metrics.search.far_text import tail_of
from dropformer.metrics.search.rungs import read_texts, rung_plan
from dropformer.metrics.search.strategy import Target
from dropformer.prune.plan import Plan
from dropformer.prune.rungs.registry import parse_rungs
from dropformer.prune.spec import named_layers

GOALS = {0.5: 1.01, 0.3333: 1.02, 0.25: 1.04}
FAR = 1024
WIDTHS = (256, 512, 1024, 2048, 4096)


def chosen(opened: Any, args: argparse.Namespace) -> dict[str, str]:
    """For each share of the cache the spec that names the rung of each layer."""
    outline, rungs = api.outline(opened.model), parse_rungs(args.rungs)
    rows = windows(Calibration("builtin", args.read, args.length), opened.tokenizer).ids
    tail = tail_of(args.length)
    start = time.process_time()
    texts = [far_recall(row, opened.tokenizer, tail, seed) for seed, row in enumerate(rows)]
    search = read_texts(opened.model, outline, rungs, texts)
    print(f"{len(texts)} texts of {args.length} tokens read, {time.process_time() - start:.0f} s of CPU", flush=True)
    found = {}
    for share in args.shares.split(","):
        target = Target(budget=f"kv:-{100 * (1 - float(share)):g}%", context=args.length, rungs=rungs)
        plan = rung_plan(search, opened.ref, target)
        found[share] = named_layers(plan.layers, plan.windowed)
        print(
            f"{share} of the cache: {found[share]}; KL {', '.join(f'{kl:.4f}' for kl in search.history)}, "
            f"{search.passes:.1f} passes, {time.process_time() - start:.0f} s of CPU since the start", flush=True,
        )  # fmt: skip
    return found


def plans(opened: Any, args: argparse.Namespace) -> Iterator[tuple[str, Plan]]:
    """The chosen plans, from the file that keeps them where there is one."""
    kept = Path(args.plans) if args.plans else None
    specs = json.loads(kept.read_text()) if kept and kept.exists() else chosen(opened, args)
    if kept and not kept.exists():
        kept.write_text(json.dumps(specs, indent=1) + "\n")
    outline = api.outline(opened.model)
    for share in args.shares.split(","):
        spec = specs[share]
        yield share, api.plan_unscored(opened.ref, outline, spec, (), None)


def dropped_count(opened: Any, plan: Plan, by: str, length: int) -> int:
    """The fewest attention layers whose dropping saves as much as the plan: of the cache, or of what a step reads."""
    layers, cost = api.outline(opened.model).layers("attn"), cost_of(opened.model)

    def left(cost: ModelCost) -> float:
        return cost.kv(length) if by == "bytes" else cost.decode_elements(1, length)

    goal = left(cost.without(plan.layers).windowed(plan.windowed))
    return next(n for n in range(1, len(layers)) if left(cost.without(layers[-n:])) <= goal)


def beside(opened: Any, chosen: dict[str, Plan], args: argparse.Namespace) -> dict[str, tuple[str, Any]]:
    """Models with attention layers dropped, by the best repair, each with the name of the windows that it is beside."""
    found = {}
    for by in args.beside.split(",") if args.beside else ():
        for name, plan in chosen.items():
            count, start = dropped_count(opened, plan, by, args.length), time.process_time()
            texts = [Calibration("builtin", args.samples, min(512, args.length))]
            made, repair = dropformer.improve(opened, f"attn:{count}", "best", texts)
            print(f"{name}, same {by}: attn:{count}, {', '.join(map(str, made.layers))}; {repair.cost}", flush=True)
            seconds = time.process_time() - start
            print(f"  {seconds:.0f} s of CPU", flush=True)
            found[f"{count} dropped, same {by}"] = name, dropformer.drop(opened, made, repair)
    return found


def rows(models: dict[str, Any], opened: Any, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of each model, the dense one first."""
    plain = windows(Calibration(args.text, args.texts, text_tokens(args.length, opened.tokenizer), 1), opened.tokenizer)
    texts = [with_facts(row, opened.tokenizer, seed) for seed, row in enumerate(plain.ids)]
    far, end = min(FAR, args.length // 8), len(texts[0].ids)
    losses: dict[str, list[torch.Tensor]] = {}
    found: dict[str, dict[str, Any]] = {}
    caches = {}
    for name, model in models.items():
        start, answers = time.process_time(), []
        losses[name] = []
        for text in texts:
            lost, caches[name] = read(model, text)
            losses[name].append(lost)
            answers.append(ask(model, text, caches[name]))
        beyond = band(texts, losses[name], losses["dense"], far, end)
        assert beyond is not None
        told = needle(answers)
        found[name] = {
            "perplexity": beyond.perplexity, "nats": beyond.lost, "stderr": beyond.stderr,
            "needle": told.accuracy, "needle_tokens": told.tokens, "needle_nats": told.logprob,
            "cpu_s": time.process_time() - start,
        }  # fmt: skip
        print(
            f"{name}: perplexity beyond {far:,} {beyond.perplexity:.3f} ({beyond.lost:+.4f} nats), needle "
            f"{told.accuracy:.0%} of {told.facts}, {told.tokens:.0%} of their tokens ({told.logprob:.2f} nats), "
            f"{found[name]['cpu_s']:.0f} s", flush=True,
        )  # fmt: skip
    for name, speed in decode_behind(models, caches, args.repeats, 4).items():
        found[name] |= {
            "kv_mib": speed.kv_bytes / 2**20, "decode_ratio": speed.ratio.median, "bound": speed.bound,
            "of_bound": speed.ratio.median / speed.bound,
        }  # fmt: skip
        print(
            f"{name}: cache {speed.kv_bytes / 2**20:.1f} MiB, decode {speed.ratio} times dense, bytes allow "
            f"{speed.bound:.3f}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default="heldout")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--rungs", default=",".join(f"window:{width}+4" for width in WIDTHS))
    parser.add_argument("--read", type=int, default=2, help="texts by whose ends rungs are chosen")
    parser.add_argument("--plans", help="keeps the chosen plans, or gives them where it exists")
    parser.add_argument("--shares", default="0.5,0.3333,0.25")
    parser.add_argument("--choose", action="store_true", help="only choose and keep the plans of --plans")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--beside", default="", help="drops of the same `bytes` of cache, or decode `speed`")
    parser.add_argument("--samples", type=int, default=24, help="calibration windows of those drops")
    args = parser.parse_args()
    if args.quick:
        args.length, args.texts, args.repeats, args.read = 1536, 1, 3, 1
        args.rungs = "window:64+4,window:256+4"
    opened = dropformer.open_model(args.model)
    chosen = {f"windows {float(share):g}": plan for share, plan in plans(opened, args)}
    for name, plan in chosen.items():
        print(f"{name}: {plan.kv_share(args.length):.1%} of the cache at {args.length:,} tokens")
    if args.choose:
        print(json.dumps({"benchmark": "ladder", "chosen": list(chosen), "peak_rss_mib": peak() >> 20}))
        return
    drops = beside(opened, chosen, args)
    models = {"dense": opened.model, **{name: dropformer.drop(opened, plan) for name, plan in chosen.items()}}
    found = rows(models | {name: model for name, (_, model) in drops.items()}, opened, args)
    dense = found["dense"]
    for share, goal in GOALS.items():
        if row := found.get(f"windows {share:g}"):
            ratio = row["perplexity"] / dense["perplexity"]
            kept = row["needle_tokens"] / dense["needle_tokens"] if dense["needle_tokens"] else float("nan")
            print(f"{share:.0%}: {ratio:.4f} times dense (goal {goal}), tokens told {kept:.0%} of dense (goal 95%)")
    for name, (windows_name, _) in drops.items():
        lost, other = found[name]["nats"], found[windows_name]["nats"]
        print(f"{windows_name} loses {other:.4f} nats, {name} {lost:.4f}: {other / lost:.1%} (goal 10% at equal speed)")
    settings = {key: getattr(args, key) for key in ("model", "text", "length", "texts", "rungs", "read")}
    print(json.dumps({"benchmark": "ladder", **settings, "rows": found, "peak_rss_mib": peak() >> 20}))


if __name__ == "__main__":
    main()
