"""A model's own draft: equality of text, and predicted against measured acceptance and speed-up.

    python benchmarks/draft.py [--quick] [--model FOLDER] [--context N] [--prompts N] [--windows N] [--drafts NAMES]
        [--window 256] [--drafted 4] [--dropped 8] [--samples 16]

Drafts of the same model: `windows` on every attention layer; and, at the same cost, as many attention layers dropped
by `similarity`, by a greedy `search` on KL, and by that search with refits and distillation (`distilled`).  Each row
says what the text and the clock predicted before anything was decoded, and what decoding gave.  Prompts are beginnings
of a few windows of held-out text, each of which the dense model reads once.  transformers' dense step copies its whole
cache, so a step behind a static cache, which copies nothing, is timed beside it.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import torch
from transformers import StaticCache

from dropformer import api
from dropformer.eval.draft.evaluate import dense_text, evaluate_on
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import windows
from dropformer.metrics.draft.acceptance import DenseText, shortened
from dropformer.metrics.repair.base import Repair
from dropformer.metrics.search.strategy import Strategy
from dropformer.prune.draft.generation import DRAFT_TOKENS
from dropformer.prune.plan import Plan
from dropformer.prune.spec import named_layers
from dropformer.selection import improve

NEW = 16
REPEATS = 9  # of timed steps


def rows(given: argparse.Namespace, context: int, prompts: int, count: int) -> list[dict[str, Any]]:
    opened = api.open_model(given.model)
    outline = api.outline(opened.model)
    text = dense_text(
        opened.model, [windows(Calibration("heldout", count, context), opened.tokenizer)], given.temperature
    )
    found, static = [], static_step(text)
    print(f"a dense step behind a static cache takes {static:.3f} of one behind a growing cache", flush=True)
    for name in given.drafts.split(","):
        plan, repair = PLANS[name](opened, outline, given, context)
        result = evaluate_on(text, plan, given.new, -(-prompts // count), repair, given.drafted)
        spec = named_layers(plan.layers, plan.windowed)
        found.append({"draft": name, "spec": spec, "context": context, "static_step": static, **result.numbers()})
        print(name, spec, *result.lines(), sep="\n  ", flush=True)
    return found


@torch.inference_mode()
def static_step(text: DenseText) -> float:
    """The median time of a dense step behind a static cache of a text, over one behind transformers' growing cache."""
    model, length = text.model, text.rows[0].shape[1] - REPEATS - 1
    growing = shortened(text.kept[0][0], length)
    static = StaticCache(config=model.config, max_cache_len=length + REPEATS)
    for index, entry in enumerate(growing.layers):
        static.update(entry.keys, entry.values, index)
    took: dict[str, list[float]] = {"growing": [], "static": []}
    for at in range(length, length + REPEATS):
        for name, cache in (("growing", growing), ("static", static)):
            start = time.perf_counter()
            model(input_ids=text.rows[0][:, at : at + 1], past_key_values=cache, use_cache=True)
            took[name].append(time.perf_counter() - start)
    return statistics.median(took["static"]) / statistics.median(took["growing"])


Made = tuple[Plan, Repair | None]


def windowed(opened: Any, outline: Any, given: argparse.Namespace, context: int) -> Made:
    every = ",".join(str(layer.index) for layer in outline.layers("attn"))
    spec = f"window={every}@{given.window or min(256, context // 4)}+4"
    return api.plan_unscored(opened.ref, outline, spec, (), None), None


def similar(opened: Any, outline: Any, given: argparse.Namespace, context: int) -> Made:
    return api.plan(api.analyze(opened, calibration=Calibration("builtin", 4, 256)), f"attn:{given.dropped}"), None


def searched(opened: Any, outline: Any, given: argparse.Namespace, context: int, repair: tuple[str, ...] = ()) -> Made:
    texts = [Calibration("builtin", given.samples)]
    return improve(opened, f"attn:{given.dropped}", Strategy(select="greedy", repair=repair), texts)


PLANS = {
    "windows": windowed,
    "similarity": similar,
    "search": searched,
    "distilled": partial(searched, repair=("refit", "distill")),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--windows", type=int, default=5, help="of held-out text, from which the prompts are")
    parser.add_argument("--new", type=int, default=NEW, help="tokens decoded after each prompt")
    parser.add_argument("--drafts", default=",".join(PLANS))
    parser.add_argument("--dropped", type=int, default=8, help="attention layers of the drafts that drop some")
    parser.add_argument("--samples", type=int, default=16, help="windows of 512 tokens to search and repair on")
    parser.add_argument("--window", type=int, help="tokens that windowed layers see (default 256)")
    parser.add_argument("--drafted", type=int, default=DRAFT_TOKENS, help="tokens drafted at a time")
    parser.add_argument("--temperature", type=float, default=0.0)
    given = parser.parse_args()
    context, prompts, count = given.context, given.prompts, given.windows
    if given.quick:
        context, prompts, count, given.drafts = 256, 2, 1, "windows,similarity"
    found = rows(given, context, prompts, count)
    line = {"benchmark": "draft", "model": given.model, "threads": torch.get_num_threads(), "rows": found}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
