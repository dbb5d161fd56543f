"""Text that needs its far past: passages repeated, and names and numbers asked for again, at many distances.

On prose alone a layer that retrieves looks as idle as one that does nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

APART = (1500, 3000, 6000, 12000)  # characters between a passage and its repetition, in turn
PASSAGE, FACTS = 600, 6
PLACES = ("the north gate", "the old mill", "the third floor", "the harbour", "the archive", "the east wing")
PEOPLE = ("Adams", "Bianchi", "Chen", "Dubois", "Eriksen", "Farouk", "Garcia", "Horvath", "Ivanov", "Jones")


def recall(texts: Iterable[str]) -> Iterator[str]:
    """Documents made of these texts, the same every time: facts and a passage, other text, the facts and it again."""
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
