"""Run by an interpreter with mlx-lm: what a checkpoint gives, as JSON on the last line."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

work = json.loads(sys.argv[1])
ids = work["ids"]
try:
    model, _ = load_model(Path(work["folder"]), trust_remote_code=work["trust"])
except ValueError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()


def log_softmax(logits):
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


whole = log_softmax(model(mx.array([ids])))[0].tolist()
cache = make_prompt_cache(model)
pieces = [ids[:3], ids[3:6], *([token] for token in ids[6:])]
cached = [row for piece in pieces for row in log_softmax(model(mx.array([piece]), cache=cache))[0].tolist()]
tokens, last = [], cached[-1]
for _ in range(work["steps"]):
    tokens.append(max(range(len(last)), key=last.__getitem__))
    last = log_softmax(model(mx.array([tokens[-1:]]), cache=cache))[0, -1].tolist()
widths = [entry.keys.shape[-1] for entry in cache]
print(json.dumps({"logprobs": whole, "cached": cached, "tokens": tokens, "widths": widths}))
