"""Long-range recall: repeated passages, and questions about names and numbers stated earlier, at several distances.

On ordinary text, a layer that retrieves from far back looks as redundant as one that does nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

APART = (1500, 3000, 6000, 12000)  # characters between a passage and its repetition, cycled
PASSAGE, FACTS = 600, 6
PLACES = ("the north gate", "the old mill", "the third floor", "the harbour", "the archive", "the east wing")
PEOPLE = ("Adams", "Bianchi", "Chen", "Dubois", "Eriksen", "Farouk", "Garcia", "Horvath", "Ivanov", "Jones")


def recall(texts: Iterable[str]) -> Iterator[str]:
    """Deterministic documents from these texts: facts, a passage, other text, the passage and the facts again."""
    draw = random.Random(0)
    rest = "\n".join(texts)
    at = number = 0
    while at + PASSAGE + APART[number % len(APART)] <= len(rest):
        passage, between = rest[at : at + PASSAGE], rest[at + PASSAGE : at + PASSAGE + APART[number % len(APART)]]
        all_facts = facts(draw, FACTS)
        again = draw.sample(all_facts, FACTS)
        told = "\n".join(f"{name} keeps key {code} at {place}." for name, code, place in all_facts)
        asked = "\n".join(f"Which key does {name} keep? Key {code}. Where? At {place}." for name, code, place in again)
        yield f"{told}\n\n{passage}\n\n{between}\n\n{passage}\n\n{asked}\n"
        at += PASSAGE + len(between)
        number += 1


def facts(draw: random.Random, count: int) -> list[tuple[str, int, str]]:
    """Names, each with a key and a place; at most as many as there are people."""
    names = draw.sample(PEOPLE, count)
    return [(name, draw.randrange(1000, 10000), draw.choice(PLACES)) for name in names]
