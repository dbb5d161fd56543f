"""A model's own draft: equality of text, and predicted against measured acceptance and speed-up.

    python benchmarks/draft.py [--quick] [--model FOLDER] [--context N] [--prompts N] [--windows N] [--drafts NAMES]

Two drafts of the same model: windows on every attention layer, and the attention layers that similarity drops.  Each
row says what the text and the clock predicted before anything was decoded, and what decoding gave.  Prompts are
beginnings of a few windows of held-out text, each of which the dense model reads once.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from dropformer import api
from dropformer.eval.draft.evaluate import dense_text, evaluate_on
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import windows
from dropformer.prune.plan import Plan

NEW = 16


def rows(given: argparse.Namespace, context: int, prompts: int, count: int) -> list[dict[str, Any]]:
    opened = api.open_model(given.model)
    outline = api.outline(opened.model)
    text = dense_text(
        opened.model, [windows(Calibration("heldout", count, context), opened.tokenizer)], given.temperature
    )
    found = []
    for name in given.drafts.split(","):
        plan = PLANS[name](opened, outline, context)
        result = evaluate_on(text, plan, given.new, -(-prompts // count))
        found.append({"draft": name, "spec": plan.spec, "context": context, **result.numbers()})
        print(name, *result.lines(), sep="\n  ", flush=True)
    return found


def windowed(opened: Any, outline: Any, context: int) -> Plan:
    every = ",".join(str(layer.index) for layer in outline.layers("attn"))
    return api.plan_unscored(opened.ref, outline, f"window={every}@{min(256, context // 4)}+4", (), None)


def similar(opened: Any, outline: Any, context: int) -> Plan:
    return api.plan(api.analyze(opened, calibration=Calibration("builtin", 4, 256)), "attn:8")


PLANS = {"windows": windowed, "similarity": similar}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--windows", type=int, default=5, help="of held-out text, from which the prompts are")
    parser.add_argument("--new", type=int, default=NEW, help="tokens decoded after each prompt")
    parser.add_argument("--drafts", default=",".join(PLANS))
    parser.add_argument("--temperature", type=float, default=0.0)
    given = parser.parse_args()
    context, prompts, count = (256, 2, 1) if given.quick else (given.context, given.prompts, given.windows)
    found = rows(given, context, prompts, count)
    line = {"benchmark": "draft", "model": given.model, "threads": torch.get_num_threads(), "rows": found}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
