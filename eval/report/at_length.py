"""`prune evaluate --long N`: perplexity by position, facts from five depths, KV bytes and decode speed at N tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from dropformer.eval.cost.decoding import decode_behind
from dropformer.eval.cost.memory import kv_bytes_at
from dropformer.eval.quality.long_context import LongText, ask, band, bands, needle, read
from dropformer.eval.report.prepare import Candidate
from dropformer.eval.report.results import ModelResult
from dropformer.progress import Progress
from dropformer.prune.loading.parts import windows_of

NEAR = 1024  # position that separates near from far where no layer has a window


def at_length(
    results: Sequence[ModelResult],
    models: Sequence[Candidate],
    texts: Sequence[LongText],
    context: int,
    progress: Progress,
) -> list[ModelResult]:
    """The results with `long`.

    Time: per model and text one forward pass and 30 questions after it, then a few decoded tokens.
    Memory: the logits of one chunk of a text, and one KV cache per model, of the last text.
    """
    losses: list[list[Tensor]] = []
    found: list[dict[str, Any]] = []
    caches = {}
    for candidate in models:
        with progress.stage(f"{context:,} tokens: {candidate.name}", len(texts)) as tick:
            own, answers = [], []
            for i, text in enumerate(texts):
                lost, caches[candidate.name] = read(candidate.model, text)
                own.append(lost)
                answers.append(ask(candidate.model, text, caches[candidate.name]))
                tick(i + 1, (i + 1) * len(text.ids))
        losses.append(own)
        told, kv = asdict(needle(answers)), kv_bytes_at(candidate.model, context)
        found.append({"context": context, "texts": len(texts), "needle": told, "kv_bytes": kv})
    for one, own in zip(found, losses, strict=True):
        dense = losses[0] if own is not losses[0] else None
        rows = (band(texts, own, dense, *bounds) for bounds in bands(len(texts[0].ids)))
        one["bands"] = [asdict(row) for row in rows if row]
    for one, candidate, own in zip(found[1:], models[1:], losses[1:], strict=True):
        one["beyond"] = _beyond(candidate.model, texts, own, losses[0])
    with progress.stage(f"decode speed behind {len(texts[-1].ids):,} tokens, interleaved"):
        speeds = decode_behind({candidate.name: candidate.model for candidate in models}, caches)
    return [
        result.model_copy(update={"long": one | {"decoding": asdict(speeds[candidate.name])}})
        for result, candidate, one in zip(results, models, found, strict=True)
    ]


def _beyond(
    model: nn.Module, texts: Sequence[LongText], losses: Sequence[Tensor], dense: Sequence[Tensor]
) -> dict[str, Any] | None:
    """Loss over dense at positions within the widest window of the model's layers, and at those beyond."""
    seen = [window.width + window.sinks for window in windows_of(model).values()]
    edge, context = max(seen, default=NEAR), len(texts[0].ids)
    within, past = band(texts, losses, dense, 1, edge), band(texts, losses, dense, edge, context)
    if not within or not past:
        return None
    return {"window": edge if seen else None, "within": asdict(within), "past": asdict(past)}
