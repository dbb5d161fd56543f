"""What a model keeps of a long text: perplexity by position, and facts asked for again from five depths.

The text is a real one into which facts are put, so that one forward pass serves both.  Positions are grouped in
bands that double (1 to 127, 128 to 255, ...), so that what attention windows take shows where it is taken; the
facts' own tokens do not count there.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dropformer.eval.quality.head import SplitModel
from dropformer.eval.quality.perplexity import losses_of
from dropformer.eval.quality.probes import NAMES
from dropformer.metrics.calibration.far_recall import plain_ids
from dropformer.prune.errors import EvaluationError
from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.parts import continued, empty_cache

FIRST_BAND = 128  # positions in the first band
RUN = 64  # neighbouring positions whose losses count as one observation
DEPTHS, ASKED = 5, 6  # places in the text, and facts at each
KINDS = ("secret number", "locker number", "room number")  # of a person; each name has one of each
ROOM = 128  # tokens left behind the text for a question and for what is decoded


@dataclass(frozen=True)
class Fact:
    """A question and its answer, in token ids."""

    question: Tensor
    answer: Tensor


@dataclass(frozen=True)
class LongText:
    """ids [T]; scored [T]: which tokens belong to the text itself; facts: in the order of depth."""

    ids: Tensor
    scored: Tensor
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Band:
    """Positions `start` to `stop` - 1: perplexity, and what the pruned model loses there (nats, None: no other)."""

    start: int
    stop: int
    perplexity: float
    lost: float | None = None
    stderr: float | None = None


@dataclass(frozen=True)
class Needle:
    """Share of facts whose every token is the likeliest one, in all and by depth; mean log-likelihood in nats.

    tokens: the share of the answers' tokens that are the likeliest behind the right ones before, with its standard
    error over facts: of a small model's numbers more digits are right than whole numbers.
    """

    accuracy: float
    stderr: float
    logprob: float
    facts: int
    by_depth: tuple[float, ...]
    tokens: float = 0.0
    tokens_stderr: float = 0.0


def text_tokens(context: int, tokenizer: Any) -> int:
    """Tokens of plain text in a long text for this context.  Raises EvaluationError where facts leave no room."""
    left = context - ROOM - sum(len(plain_ids(tokenizer, sentence)) for sentence, _, _ in _facts(0))
    if left < ROOM:
        raise EvaluationError(f"facts from five depths do not fit into {context} tokens; give more, as in --long 2048")
    return left


def with_facts(ids: Tensor, tokenizer: Any, seed: int = 0) -> LongText:
    """A text [T'] with six facts put in at 10%, 30%, 50%, 70% and 90% of it."""
    parts: list[Tensor] = []
    scored: list[Tensor] = []
    found, at, all_facts = [], 0, _facts(seed)
    for depth in range(DEPTHS):
        facts = all_facts[depth * ASKED : (depth + 1) * ASKED]
        to = (2 * depth + 1) * len(ids) // (2 * DEPTHS)
        told = plain_ids(tokenizer, "".join(sentence for sentence, _, _ in facts))
        parts += [ids[at:to], told]
        scored += [torch.ones(to - at, dtype=torch.bool), torch.zeros(len(told), dtype=torch.bool)]
        found += [_fact(tokenizer, question, answer) for _, question, answer in facts]
        at = to
    rest = torch.ones(len(ids) - at, dtype=torch.bool)
    return LongText(torch.cat([*parts, ids[at:]]), torch.cat([*scored, rest]), _told_apart(found))


def _facts(seed: int) -> list[tuple[str, str, str]]:
    """Sentences with their questions and answers."""
    draw = random.Random(seed)
    pairs = draw.sample([(name, kind) for name in NAMES for kind in KINDS], DEPTHS * ASKED)
    codes = draw.sample(range(1000, 10000), len(pairs))
    asked = [f"The {kind} of {name} is" for name, kind in pairs]
    return [(f" {text} {code}.", f"\n{text}", f" {code}") for text, code in zip(asked, codes, strict=True)]


def _fact(tokenizer: Any, question: str, answer: str) -> Fact:
    asked, whole = plain_ids(tokenizer, question), plain_ids(tokenizer, question + answer)
    return Fact(asked, whole[len(asked) :])


def _told_apart(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts with a first token that all answers share (the space of " 4821") at the end of the questions."""
    while min(len(fact.answer) for fact in facts) > 1 and len({int(fact.answer[0]) for fact in facts}) == 1:
        facts = [Fact(torch.cat([fact.question, fact.answer[:1]]), fact.answer[1:]) for fact in facts]
    return tuple(facts)


@torch.inference_mode()
def read(model: PreTrainedModel, text: LongText) -> tuple[Tensor, Any]:
    """The loss of every token but the first, [T - 1] in nats and float64, and the cache that holds the text."""
    split, cache = SplitModel(model), empty_cache(model)
    inputs = text.ids[None].to(split.device)
    hidden = split.hidden(inputs, past_key_values=cache, use_cache=True).last_hidden_state[0, :-1]
    pieces = split.pieces(hidden)
    targets = text.ids[1:].to(hidden.device)
    return torch.cat([losses_of(split, hidden[piece], targets[piece]) for piece in pieces]).cpu().double(), cache


@torch.inference_mode()
def ask(model: nn.Module, text: LongText, cache: Any) -> list[tuple[float, float]]:
    """Log-likelihood of each fact's answer behind the text in the cache, and which share of its tokens is likeliest.

    The cache stays as it is.  Time: a short forward pass a fact.
    """
    found = []
    for fact in text.facts:
        ids = torch.cat([fact.question, fact.answer])[None, :-1].to(input_device(model))
        logits = model(input_ids=ids, past_key_values=continued(cache), use_cache=True).logits
        logits = logits[0, len(fact.question) - 1 :].float()
        answer = fact.answer.to(logits.device)
        logprob = logits.log_softmax(-1).gather(1, answer[:, None]).sum()
        found.append((float(logprob), float((logits.argmax(-1) == answer).double().mean())))
    return found


def needle(answers: Sequence[Sequence[tuple[float, float]]]) -> Needle:
    """From what `ask` found in each text."""
    shares = torch.tensor([[share for _, share in one] for one in answers], dtype=torch.float64)  # [texts, facts]
    right, count = (shares == 1).double(), shares.numel()
    told = float(right.mean())
    by_depth = right.view(len(answers), DEPTHS, ASKED).mean((0, 2))
    logprob = sum(value for one in answers for value, _ in one) / count
    return Needle(
        told, math.sqrt(told * (1 - told) / count), logprob, count, tuple(by_depth.tolist()),
        float(shares.mean()), float(shares.std() / math.sqrt(count)),
    )  # fmt: skip


def bands(context: int) -> list[tuple[int, int]]:
    """Bounds of the bands of a text: 300 -> (1, 128), (128, 256), (256, 300)."""
    edges = [1, FIRST_BAND]
    while edges[-1] < context:
        edges.append(2 * edges[-1])
    return [(low, min(high, context)) for low, high in itertools.pairwise(edges) if low < context]


def band(
    texts: Sequence[LongText], losses: Sequence[Tensor], dense: Sequence[Tensor] | None, start: int, stop: int
) -> Band | None:
    """One band from the losses of each text's tokens but the first, [T - 1], and the dense model's.

    None where no scored token lies in it.  losses[t - 1] is that of the token at position t.  The standard error is
    over runs of `RUN` scored positions, None where there is one.
    """
    counts = [text.scored[start:stop] for text in texts]

    def within(all_losses: Sequence[Tensor]) -> list[Tensor]:
        return [loss[start - 1 : stop - 1][count] for loss, count in zip(all_losses, counts, strict=True)]

    if not any(bool(count.any()) for count in counts):
        return None
    perplexity = math.exp(min(700.0, float(torch.cat(within(losses)).mean())))
    if dense is None:
        return Band(start, stop, perplexity)
    lost = [own - other for own, other in zip(within(losses), within(dense), strict=True)]
    runs = torch.stack([run.mean() for part in lost for run in part.split(RUN) if len(run)])
    stderr = float(runs.std() / math.sqrt(len(runs))) if len(runs) > 1 else None
    return Band(start, stop, perplexity, float(torch.cat(lost).mean()), stderr)
