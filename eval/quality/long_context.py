"""What a model keeps of a long text: perplexity by position, and facts asked for again from five depths.

Positions are grouped in bands that double (1 to 127, 128 to 255, ... of the text), so that what attention windows
take shows where it is taken.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.eval.quality.probes import (
    NAMES,
    Probe,
    ProbeResult,
    Question,
    answer_scores,
    filler,
    others,
    read,
    result_of,
)
from dropformer.prune.errors import EvaluationError

FIRST_BAND = 128  # positions in the first band
RUN = 64  # neighbouring positions whose losses count as one observation
DEPTHS, ASKED = 5, 6  # places in the text, and facts at each
KINDS = ("secret number", "locker number", "room number")  # of a person; each name has one of each


@dataclass(frozen=True)
class Band:
    """Positions `start` to `stop` - 1: perplexity, and what the pruned model loses there (nats, None: no other)."""

    start: int
    stop: int
    perplexity: float
    lost: float | None = None
    stderr: float | None = None

    def __str__(self) -> str:
        return f"positions {self.start:,} to {self.stop - 1:,}"


@dataclass(frozen=True)
class Needle:
    """Accuracy of facts asked for again behind a text of `tokens` tokens, in all and from each depth."""

    tokens: int
    whole: ProbeResult
    by_depth: tuple[float, ...]


def bands(context: int) -> list[tuple[int, int]]:
    """Bounds of the bands of a text: 300 -> (1, 128), (128, 256), (256, 300)."""
    edges = [1, FIRST_BAND]
    while edges[-1] < context:
        edges.append(2 * edges[-1])
    return [(low, min(high, context)) for low, high in itertools.pairwise(edges) if low < context]


def by_position(losses: Sequence[Tensor], dense: Sequence[Tensor] | None = None) -> list[Band]:
    """Bands from the losses of each text's tokens but the first, [T - 1] in nats, and the dense model's of the same."""
    context = len(losses[0]) + 1
    return [band(losses, dense, low, high) for low, high in bands(context)]


def band(losses: Sequence[Tensor], dense: Sequence[Tensor] | None, start: int, stop: int) -> Band:
    """One band; the standard error is over runs of `RUN` positions, None where there is one run.

    losses[t - 1] is that of the token at position t.
    """
    parts = [loss[start - 1 : stop - 1] for loss in losses]
    perplexity = math.exp(min(700.0, float(torch.cat(parts).mean())))
    if dense is None:
        return Band(start, stop, perplexity)
    lost = [part - other[start - 1 : stop - 1] for part, other in zip(parts, dense, strict=True)]
    runs = torch.stack([run.mean() for part in lost for run in part.split(RUN)])
    stderr = float(runs.std() / math.sqrt(len(runs))) if len(runs) > 1 else None
    return Band(start, stop, perplexity, float(torch.cat(lost).mean()), stderr)


def long_needle(tokenizer: Any, tokens: int, seed: int = 0) -> Probe:
    """A probe of `tokens` tokens: six facts at each of five depths in filler; answers to other facts are wrong ones.

    Raises EvaluationError where so few tokens do not hold the facts.
    """
    draw = random.Random(seed)
    pairs = draw.sample([(name, kind) for name in NAMES for kind in KINDS], DEPTHS * ASKED)
    codes = draw.sample(range(1000, 10000), len(pairs))
    asked = [f"The {kind} of {name} is" for name, kind in pairs]
    facts = [f"{text} {code}." for text, code in zip(asked, codes, strict=True)]
    questions = tuple(
        Question(text, tuple(f" {code}" for code in (codes[i], *others(draw, codes, i))))
        for i, text in enumerate(asked)
    )
    left = tokens - sum(_length(tokenizer, fact) for fact in facts) - _length(tokenizer, facts[0]) - DEPTHS
    sentences = list(_filler(draw, tokenizer, left))
    if len(sentences) < len(facts):
        raise EvaluationError(f"the needle probe does not fit into {tokens} tokens; give more, as in --long 2048")
    text = []
    for depth in range(DEPTHS):  # filler, half of it behind the last facts
        text += sentences[_place(depth, len(sentences)) : _place(depth + 1, len(sentences))]
        text += facts[depth * ASKED : (depth + 1) * ASKED]
    return Probe("needle", " ".join([*text, *sentences[_place(DEPTHS, len(sentences)) :]]) + "\n", questions)


def _place(depth: int, sentences: int) -> int:
    """Sentences before the facts of a depth: 10%, 30%, 50%, 70%, 90% of them; 0 for the beginning."""
    return 0 if not depth else (2 * depth - 1) * sentences // (2 * DEPTHS)


def _filler(draw: random.Random, tokenizer: Any, tokens: int) -> Iterator[str]:
    while tokens > 0:
        sentence = filler(draw)
        tokens -= _length(tokenizer, sentence)
        if tokens >= 0:
            yield sentence


def _length(tokenizer: Any, sentence: str) -> int:
    return len(tokenizer(" " + sentence, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def ask(model: nn.Module, tokenizer: Any, probe: Probe) -> tuple[Needle, Any]:
    """The needle's accuracy, and the cache that holds its text, for what else is to be measured at that length.

    Time: a prefill of the text and 30 short questions; memory: the text's cache three times at most.
    """
    shared = read(model, tokenizer, probe.shared)
    scores = answer_scores(model, tokenizer, probe, shared, together=False)
    right = [float(one.argmax() == 0) for one in scores]
    depths = tuple(sum(right[i : i + ASKED]) / ASKED for i in range(0, len(right), ASKED))
    return Needle(shared.get_seq_length(), result_of(probe, scores), depths), shared
