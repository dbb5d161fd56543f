"""Long texts whose last tokens need what was said long before: facts asked for again, and passages repeated."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from dropformer.metrics.calibration.recall import PEOPLE, facts

ITEM = 22  # tokens of the tail for each fact or passage
TOLD, ASKED = "\n{} keeps key {} at {}.\n", "\nWhich key does {} keep? Key {}. Where? At {}."


def far_recall(body: Tensor, tokenizer: Any, tail: int, seed: int = 0) -> Tensor:
    """A text [T] as long as the body, of whose last `tail` tokens two thirds ask for facts and repeat passages.

    The first third continues with the body, so that prose counts too.  What is asked for is told at even distances,
    from the beginning of the text on.
    """
    tail = 2 * tail // 3
    count = min(2 * len(PEOPLE), max(2, tail // ITEM))
    drawn = iter(facts(random.Random(seed), (count + 1) // 2))
    step = (len(body) - tail) // count
    told, asked = [], []
    for i in range(count):
        part = body[i * step : (i + 1) * step]
        if i % 2:
            told.append(part)
            asked.append(part[len(part) // 2 :][:ITEM])
        else:
            fact = next(drawn)
            told += [plain_ids(tokenizer, TOLD.format(*fact)), part]
            asked.append(plain_ids(tokenizer, ASKED.format(*fact)))
    told.append(body[count * step :])
    order = random.Random(seed).sample(range(count), count)
    end = torch.cat([asked[i] for i in order])[-tail:]
    return torch.cat([torch.cat(told)[: len(body) - len(end)], end])


def plain_ids(tokenizer: Any, text: str) -> Tensor:
    """The tokens [T] of a text, without special ones."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
