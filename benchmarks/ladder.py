"""Attention windows in place of drops, at length: what the KV cache shrinks to, and what that costs.

    python benchmarks/ladder.py [--quick] [--model smollm2-135m] [--text heldout] [--length 8192] [--texts 2]
        [--window 256+4] [--shares 0.5,0.3333,0.25] [--drops]

Layers are ranked by one pass over the calibration text (`window_loss`); for each share the fewest layers get the
window that bring the cache of `--length` tokens down to it. Dense and windowed models read the same texts: perplexity
over dense at positions beyond 1,024 (an eighth of the length where that is shorter), facts from five depths, and
decode speed behind the text, models in turn, beside what the bytes of weights and cache allow. `--drops` adds the
attention layers whose dropping saves the same bytes, chosen and repaired by `--quality best`: that takes an hour.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import dropformer
from dropformer import api
from dropformer.eval.cost.decoding import decode_behind
from dropformer.eval.quality.long_context import ask, band, needle, read, text_tokens, with_facts
from dropformer.metrics.analysis.window_loss import TIMES, window_losses
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import windows
from dropformer.prune.plan import Plan
from dropformer.prune.window import Window

GOALS = {0.5: 1.01, 0.3333: 1.02, 0.25: 1.04}
FAR = 1024


def plans(opened: Any, window: Window, shares: Sequence[float], length: int, tokens: int) -> Iterator[tuple[str, Plan]]:
    """For each share of the cache the plan of fewest windows; `tokens`: read to rank by."""
    outline, size = api.outline(opened.model), TIMES * window.width
    data = windows(Calibration("builtin", max(1, tokens // size), size), opened.tokenizer)
    start = time.process_time()
    losses = window_losses(opened.model, outline, [inputs for inputs, _ in data.batches(1)], window)
    print(f"ranked by {len(data)} x {size} tokens in one pass, {time.process_time() - start:.0f} s of CPU", flush=True)
    for share in shares:
        made = (
            api.plan_unscored(opened.ref, outline, f"window:{count}@{window}", (), None, losses)
            for count in range(1, len(losses) + 1)
        )
        found = next((plan for plan in made if plan.kv_share(length) <= share), None)
        if found is None:
            raise SystemExit(f"windows of {window} in every layer leave more than {share} of the cache")
        print(f"{share:.0%} of the cache: {', '.join(found.windows)}", flush=True)
        yield f"{share:g}", found


def dropping(opened: Any, share: float) -> Any:
    """As few attention layers dropped as bring the cache to the share, by the best repair."""
    layers = api.outline(opened.model).layers("attn")
    count = next(n for n in range(1, len(layers)) if 1 - n / len(layers) <= share)
    plan, repair = dropformer.improve(opened, f"attn:{count}", "best")
    return dropformer.drop(opened, plan, repair)


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
            "needle": told.accuracy, "needle_nats": told.logprob, "cpu_s": time.process_time() - start,
        }  # fmt: skip
        print(
            f"{name}: perplexity beyond {far:,} {beyond.perplexity:.3f} ({beyond.lost:+.4f} nats), needle "
            f"{told.accuracy:.0%} of {told.facts} ({told.logprob:.2f} nats), {found[name]['cpu_s']:.0f} s", flush=True,
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
    parser.add_argument("--window", default="256+4")
    parser.add_argument("--shares", default="0.5,0.3333,0.25")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ranked", type=int, default=8192, help="tokens read to rank layers by")
    parser.add_argument("--drops", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.length, args.texts, args.window, args.repeats, args.ranked = 1536, 1, "64+4", 3, 1024
    opened = dropformer.open_model(args.model)
    shares = [float(share) for share in args.shares.split(",")]
    models = {"dense": opened.model}
    for name, plan in plans(opened, Window.parse(args.window), shares, args.length, args.ranked):
        models[f"windows {name}"] = dropformer.drop(opened, plan)
    for share in shares if args.drops else ():
        models[f"drops {share:g}"] = dropping(opened, share)
    found = rows(models, opened, args)
    dense = found["dense"]
    for share, goal in GOALS.items():
        if row := found.get(f"windows {share:g}"):
            ratio = row["perplexity"] / dense["perplexity"]
            kept = row["needle"] / dense["needle"] if dense["needle"] else float("nan")
            print(f"{share:.0%}: {ratio:.4f} times dense (goal {goal}), needle {kept:.0%} of dense (goal 95%)")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    settings = {key: getattr(args, key) for key in ("model", "text", "length", "texts", "window", "ranked")}
    print(json.dumps({"benchmark": "ladder", **settings, "rows": found, "peak_rss_mib": round(peak)}))


if __name__ == "__main__":
    main()
