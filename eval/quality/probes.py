"""Three small probes for what multiple-choice knowledge tests hide: copying, arithmetic, long context.

Published curves hold on MMLU longer than on GSM8K and long context, so the report runs these beside it.
Questions are generated from a seed; the right answer competes with wrong ones of its own kind, by
log-likelihood, so that no text is sampled.

copy      a list of words, then the list begun again: which word follows?
addition  two-digit sums behind worked examples, against near misses
needle    facts scattered in a long text of filler, asked for at its end, against answers to others
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dropformer.metrics.calibration.settings import context_of
from dropformer.prune.errors import EvaluationError
from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.parts import continued, empty_cache
from dropformer.prune.registry import Registry


@dataclass(frozen=True)
class Question:
    """A text and its possible continuations; the first is right."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """Questions behind one shared text (empty, or the long one that is computed once)."""

    name: str
    shared: str
    questions: tuple[Question, ...]

    def tokens(self, tokenizer: Any) -> int:
        """Tokens of the shared text and the longest question with an answer."""
        longest = max((question.text + max(question.answers, key=len) for question in self.questions), key=len)
        return len(tokenizer(self.shared + longest, verbose=False)["input_ids"])

    @property
    def chance(self) -> float:
        return sum(1 / len(question.answers) for question in self.questions) / len(self.questions)


@dataclass(frozen=True)
class ProbeResult:
    """accuracy: share of questions whose right answer is the likeliest.  logprob: mean log-likelihood
    of the right answer, in nats; it moves before accuracy does.  chance: accuracy of guessing."""

    name: str
    accuracy: float
    stderr: float
    logprob: float
    questions: int
    chance: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.accuracy:.0%} ± {self.stderr:.0%} of {self.questions} right "
            f"(chance {self.chance:.0%}), {self.logprob:.2f} nats"
        )


_WORDS = (
    "apple", "river", "stone", "window", "garden", "paper", "silver", "mountain", "bottle", "market",
    "candle", "forest", "hammer", "island", "jacket", "kitchen", "ladder", "mirror", "needle", "orange",
    "pencil", "rabbit", "saddle", "table", "umbrella", "valley", "wagon", "yellow", "basket", "castle",
    "dragon", "engine", "feather", "guitar", "harbor", "insect", "jungle", "kettle", "lemon", "magnet",
)  # fmt: skip
NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Frank", "Greta", "Henry",
    "Irene", "Jacob", "Karen", "Louis", "Maria", "Nathan", "Olga", "Peter",
)  # fmt: skip
_FILLER = (
    "The {0} stood near the {1} for most of the year.",
    "Nobody remembered why the {0} had been painted like the {1}.",
    "In the evening a {0} was carried past the {1}.",
    "Some said that every {0} needs a {1}, and others did not agree.",
    "It rained, and the {0} was left beside the {1} until morning.",
)


LISTED, WORKED = 12, 6  # words of a list, worked examples


def copying(seed: int = 0, count: int = 32) -> Probe:
    """Lists of `LISTED` different words, repeated up to a word from the second half; 4 wrong words of the list."""
    draw = random.Random(seed)

    def question() -> Question:
        words = draw.sample(_WORDS, LISTED)
        at = draw.randrange(LISTED // 2, LISTED)
        wrong = draw.sample([word for word in words if word not in (words[at], words[at - 1])], 4)
        text = f"{' '.join(words)}\n{' '.join(words[:at])}"
        return Question(text, tuple(f" {word}" for word in (words[at], *wrong)))

    return Probe("copy", "", tuple(question() for _ in range(count)))


def addition(seed: int = 0, count: int = 32) -> Probe:
    """Sums of two two-digit numbers behind `WORKED` worked ones; 4 near misses, equally long."""
    draw = random.Random(seed)

    def pair() -> tuple[int, int]:
        return draw.randrange(10, 50), draw.randrange(10, 50)

    def question() -> Question:
        first, second = pair()
        right = first + second
        near = [n for d in (1, 2, 10, 9, 11, 20) for n in (right + d, right - d) if 20 <= n <= 99]
        wrong = draw.sample(near, 4)
        return Question(f"{first} + {second} =", tuple(f" {n}" for n in (right, *wrong)))

    worked = "".join(f"{a} + {b} = {a + b}\n" for a, b in (pair() for _ in range(WORKED)))
    return Probe("addition", worked, tuple(question() for _ in range(count)))


def needle(seed: int = 0, count: int = 12, sentences: int = 60) -> Probe:
    """`count` facts at even depths in `sentences` sentences of filler; 4 other facts' answers are wrong ones."""
    draw = random.Random(seed)
    names = draw.sample(NAMES, count)
    codes = draw.sample(range(1000, 10000), count)
    filler = [draw.choice(_FILLER).format(*draw.sample(_WORDS, 2)) for _ in range(sentences)]
    for place, (name, code) in enumerate(zip(names, codes, strict=True)):
        depth = (2 * place + 1) * sentences // (2 * count) + place
        filler.insert(depth, f"The secret number of {name} is {code}.")
    questions = tuple(
        Question(
            f"The secret number of {name} is",
            tuple(f" {code}" for code in (codes[place], *_others(draw, codes, place))),
        )
        for place, name in enumerate(names)
    )
    return Probe("needle", " ".join(filler) + "\n", questions)


PROBES: Registry[Callable[[int], Probe]] = Registry(
    "probe", {"copy": copying, "addition": addition, "needle": needle}, EvaluationError
)


def run_probes(model: nn.Module, tokenizer: Any, names: Sequence[str] | None = None) -> list[ProbeResult]:
    """Run the probes (all, or those named) on a causal language model, less those longer than its context.

    Raises EvaluationError for an unknown name.
    """
    probes = [PROBES[name](0) for name in (PROBES if names is None else names)]
    room = context_of(model.config) or math.inf
    return [score(model, tokenizer, probe) for probe in probes if probe.tokens(tokenizer) <= room]


@torch.inference_mode()
def score(model: nn.Module, tokenizer: Any, probe: Probe) -> ProbeResult:
    """Accuracy and mean log-likelihood of the right answers.

    The shared text is computed once; each question continues a copy of its cache, and all answers of a
    question go through the model together.
    """
    shared = empty_cache(model)
    if probe.shared:
        model(
            input_ids=_ids(tokenizer, probe.shared, model, special=True)[None], past_key_values=shared, use_cache=True
        )
    scores = [_answer_scores(model, tokenizer, continued(shared), question) for question in probe.questions]
    count = len(scores)
    accuracy = sum(int(score.argmax() == 0) for score in scores) / count
    return ProbeResult(
        name=probe.name,
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / count),
        logprob=float(sum(score[0] for score in scores)) / count,
        questions=count,
        chance=probe.chance,
    )


def _answer_scores(model: nn.Module, tokenizer: Any, cache: Any, question: Question) -> Tensor:
    """Log-likelihood of each answer after what `cache` holds and the question's text, in nats.  [answers]"""
    special = not cache.get_seq_length()
    text = _ids(tokenizer, question.text, model, special)
    tails = [_ids(tokenizer, question.text + answer, model, special)[len(text) :] for answer in question.answers]
    start = model(input_ids=text[None], past_key_values=cache, use_cache=True).logits[:, -1:]
    answers = pad_sequence(tails, batch_first=True)
    logits = start.expand(len(tails), -1, -1)
    if answers.shape[1] > 1:  # padding comes last, where nothing that is scored can see it
        cache.batch_repeat_interleave(len(tails))
        rest = model(input_ids=answers[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([logits, rest], dim=1)
    scores = logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    lengths = torch.tensor([len(tail) for tail in tails], device=scores.device)
    inside = torch.arange(answers.shape[1], device=scores.device) < lengths[:, None]
    return (scores * inside).sum(-1).cpu()


def _ids(tokenizer: Any, text: str, model: nn.Module, special: bool) -> Tensor:
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    return torch.tensor(ids, dtype=torch.long, device=input_device(model))


def _others(draw: random.Random, codes: Sequence[int], place: int) -> list[int]:
    return draw.sample([code for code in codes if code != codes[place]], 4)
