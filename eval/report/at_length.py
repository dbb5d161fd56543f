"""`prune evaluate --long N`: perplexity by position, facts from five depths, KV bytes and decode speed at N tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from dropformer.eval.cost.decoding import decode_behind
from dropformer.eval.cost.memory import kv_bytes_at
from dropformer.eval.quality.long_context import ask, band, by_position
from dropformer.eval.quality.perplexity import token_losses
from dropformer.eval.report.prepare import Candidate, LongInputs
from dropformer.eval.report.results import ModelResult
from dropformer.progress import Progress

NEAR = 1024  # positions told apart where no layer has a window


def at_length(
    results: Sequence[ModelResult], models: Sequence[Candidate], inputs: LongInputs, progress: Progress
) -> list[ModelResult]:
    """The results with `long`.  Two forward passes over the texts' length a model and text, and 30 questions."""
    losses: list[list[Tensor]] = []
    found: list[dict[str, Any]] = []
    caches = {}
    for candidate in models:
        with progress.stage(f"perplexity by position, {inputs.ids.shape[1]:,} tokens: {candidate.name}"):
            losses.append(token_losses(candidate.model, inputs.ids))
        with progress.stage(f"facts from five depths: {candidate.name}"):
            needle, caches[candidate.name] = ask(candidate.model, candidate.tokenizer, inputs.needle)
        dense = losses[0] if len(losses) > 1 else None
        found.append(
            {
                "context": inputs.ids.shape[1],
                "texts": len(inputs.ids),
                "bands": [asdict(one) for one in by_position(losses[-1], dense)],
                "needle": asdict(needle),
                "kv_bytes": kv_bytes_at(candidate.model, inputs.ids.shape[1]),
            }
        )
    for one, candidate, own in zip(found[1:], models[1:], losses[1:], strict=True):
        one["beyond"] = _beyond(candidate.model, own, losses[0])
    with progress.stage(f"decode speed behind {inputs.ids.shape[1]:,} tokens, interleaved"):
        speeds = decode_behind({candidate.name: candidate.model for candidate in models}, caches)
    rows = zip(results, models, found, strict=True)
    return [r.model_copy(update={"long": one | {"decoding": asdict(speeds[c.name])}}) for r, c, one in rows]


def _beyond(model: nn.Module, losses: Sequence[Tensor], dense: Sequence[Tensor]) -> dict[str, Any] | None:
    """What is lost at positions within the widest window of the model's layers, and at those beyond."""
    seen = [m.window.width + m.window.sinks for m in model.modules() if hasattr(getattr(m, "window", None), "sinks")]
    edge, context = max(seen, default=NEAR), len(losses[0]) + 1
    if edge >= context:
        return None
    within, past = band(losses, dense, 1, edge), band(losses, dense, edge, context)
    return {"window": edge if seen else None, "within": asdict(within), "past": asdict(past)}
