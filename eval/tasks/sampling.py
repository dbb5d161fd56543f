"""A sample of questions, stratified by task."""

from __future__ import annotations

import random
from collections.abc import Mapping


def stratified(sizes: Mapping[str, int], limit: int, seed: int) -> dict[str, list[int]]:
    """At most `limit` question indices over the tasks, in proportion to `sizes`, each task's sorted.

    Shares are rounded by largest remainder, so totals are exact; a task whose share rounds to 0 is absent. The draw
    within a task depends only on the seed and the task's name: the same questions whatever else is evaluated with it
    at the same share.
    """
    total = sum(sizes.values())
    if limit >= total:
        return {name: list(range(size)) for name, size in sizes.items() if size}
    shares = {name: limit * size / total for name, size in sizes.items()}
    counts = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(sizes, key=lambda name: (counts[name] - shares[name], name))
    for name in by_remainder[: limit - sum(counts.values())]:
        counts[name] += 1
    return {name: _draw(name, sizes[name], count, seed) for name, count in counts.items() if count}


def _draw(name: str, size: int, count: int, seed: int) -> list[int]:
    return sorted(random.Random(f"{seed}:{name}").sample(range(size), count))
