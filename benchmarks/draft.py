"""A model's own draft: equality of text, and predicted against measured acceptance and speed-up.

    python benchmarks/draft.py [--quick] [--model FOLDER] [--context N] [--prompts N]

Two drafts of the same model: windows on every attention layer, and the attention layers that similarity drops.  Each
row says what the text and the clock predicted before anything was decoded, and what decoding gave.  The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from dropformer import api
from dropformer.eval.draft.evaluate import evaluate_draft
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import windows

NEW = 16


def rows(model: str, context: int, prompts: int, temperature: float) -> list[dict[str, Any]]:
    opened = api.open_model(model)
    data = [windows(Calibration("heldout", prompts, context), opened.tokenizer)]
    outline = api.outline(opened.model)
    scores = api.analyze(opened, calibration=Calibration("builtin", 4, 256))
    every = ",".join(str(layer.index) for layer in outline.layers("attn"))
    plans = {
        "windows": api.plan_unscored(opened.ref, outline, f"window={every}@{min(256, context // 4)}+4", (), None),
        "similarity": api.plan(scores, "attn:8"),
    }
    found = []
    for name, plan in plans.items():
        result = evaluate_draft(opened.model, plan, data, NEW, temperature)
        found.append({"draft": name, "spec": plan.spec, "context": context, **result.numbers()})
        print(name, *result.shown(False)[1:], sep="\n  ")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.0)
    given = parser.parse_args()
    context, prompts = (256, 2) if given.quick else (given.context, given.prompts)
    found = rows(given.model, context, prompts, given.temperature)
    line = {"benchmark": "draft", "model": given.model, "threads": torch.get_num_threads(), "rows": found}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
