"""Packing of token sequences into few full rows, without padding and without computing a prefix twice.

Sorted sequences are a trie in depth-first order: each adds to the one before it only what follows their common prefix.
A **row** is a range of them packed as that trie: every token once, attending only to its ancestors. A prefix that
several rows share is a **trunk**: computed once, with its keys and values cached for the rows below. Trunks nest (all
of MMLU, one subject's few-shot examples). This module does not use a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

MAX_DEPTH = 32
"""Deepest nesting of trunks; deeper ones are not worth their caches. Also bounds the recursion."""


@dataclass(frozen=True)
class Limits:
    """`tokens`: most tokens per row (a longer sequence is a row of its own).  `shared`: fewest tokens of a prefix
    that is computed separately, since a short forward pass costs as much as some tens of tokens."""

    tokens: int = 512
    shared: int = 32


@dataclass(frozen=True)
class Query:
    """Token ids, and the first position whose next-token distribution is needed."""

    tokens: tuple[int, ...]
    first: int


@dataclass
class Trunk:
    """Tokens [start, stop) of sequence `example`, after the parent trunk; then rows of sequence indices and inner
    trunks that continue at `stop`."""

    start: int
    stop: int
    example: int
    rows: list[list[int]] = field(default_factory=list)
    inner: list[Trunk] = field(default_factory=list)


@dataclass(frozen=True)
class Packed:
    """One row: `tokens` [Q], their `positions` [Q], `visible` [Q, Q] (whether the row's token attends to the
    column's), and for each sequence the indices in the row of its queried positions."""

    tokens: np.ndarray
    positions: np.ndarray
    visible: np.ndarray
    asked: list[np.ndarray]

    @property
    def is_chain(self) -> bool:
        """Whether the row is one sequence and its prefixes, so that causal attention suffices."""
        return bool((np.diff(self.positions) == 1).all())


def plan(sequences: Sequence[Query], limits: Limits) -> Trunk:
    """The trunks and rows that cover `sequences`, which must be sorted by their tokens."""
    if not sequences:
        return Trunk(0, 0, 0)
    shared = [0, *(common_prefix(one.tokens, two.tokens) for one, two in pairwise(sequences))]
    return _Planner(sequences, shared, limits).trunk(0, len(sequences), 0, 0)


def pack(sequences: Sequence[Query], start: int) -> Packed:
    """One row of sorted sequences whose common prefix [0, start) is cached."""
    pairs = pairwise(sequences)
    keeps = [0, *(common_prefix(one.tokens, two.tokens) - start for one, two in pairs)]
    news = [len(s.tokens) - start - kept for s, kept in zip(sequences, keeps, strict=True)]
    total = sum(news)
    tokens, positions = np.zeros(total, np.int64), np.zeros(total, np.int64)
    visible = np.zeros((total, total), bool)
    path, asked, used = np.zeros(0, np.int64), [], 0
    for sequence, kept, new in zip(sequences, keeps, news, strict=True):
        fresh = slice(used, used + new)
        tokens[fresh] = sequence.tokens[start + kept :]
        positions[fresh] = np.arange(start + kept, len(sequence.tokens))
        visible[fresh, path[:kept]] = True
        visible[fresh, fresh] = np.tri(new, dtype=bool)
        path = np.concatenate([path[:kept], np.arange(used, used + new)])
        asked.append(path[sequence.first - start :])
        used += new
    return Packed(tokens, positions, visible, asked)


def common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    """Length of the longest common prefix, by bisection: slices compare at C speed."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class _Planner:
    sequences: Sequence[Query]
    shared: list[int]
    limits: Limits

    def trunk(self, low: int, high: int, start: int, depth: int) -> Trunk:
        """The trunk of sequences [low, high), whose prefix [0, start) is cached."""
        branch = self._shared_by(low, high)
        stop = min(branch, *(s.first for s in self.sequences[low:high]))
        if stop - start < self.limits.shared or self._tokens(low, high, start) <= self.limits.tokens:
            stop = start
        out = Trunk(start, stop, low)
        loose: list[int] = []
        for left, right in self._children(low, high, branch):
            big = right - left > 1 and self._tokens(left, right, stop) > self.limits.tokens
            below = self.trunk(left, right, stop, depth + 1) if big and depth < MAX_DEPTH else None
            if below is None:
                loose.extend(range(left, right))
            elif below.stop > below.start:
                out.inner.append(below)
            else:
                out.rows.extend(below.rows)
                out.inner.extend(below.inner)
        out.rows.extend(self._rows(loose, stop))
        return out

    def _rows(self, loose: list[int], start: int) -> list[list[int]]:
        """Fill rows in order; a full row is split where its two sides share the shortest prefix.

        Example with 6 tokens per row and the sequences abc, abd, xyz, xyw: abc costs 3 tokens and abd 1, since ab is
        computed already; xyz would be the 7th.  Split before it, where nothing is shared: [abc, abd], [xyz, xyw].
        """
        rows: list[list[int]] = []
        row: list[int] = []
        costs: list[int] = []
        for index in loose:
            cost = self._cost(row[-1] if row else None, index, start)
            if row and sum(costs) + cost > self.limits.tokens:
                cut = self._cut([*row, index], start)
                rows.append(row[:cut])
                row = row[cut:]
                costs = [self._cost(a, b, start) for a, b in zip([None, *row], row, strict=False)]
                cost = self._cost(row[-1] if row else None, index, start)
                if row and sum(costs) + cost > self.limits.tokens:
                    rows.append(row)
                    row, costs, cost = [], [], self._cost(None, index, start)
            row.append(index)
            costs.append(cost)
        return [*rows, row] if row else rows

    def _cut(self, row: list[int], start: int) -> int:
        """The index in the second half of `row` at which its two sides share the shortest prefix."""
        places = range(len(row) // 2 or 1, len(row))
        return min(reversed(places), key=lambda i: self._shared_by(row[i - 1], row[i] + 1))

    def _cost(self, before: int | None, index: int, start: int) -> int:
        """Tokens that a sequence adds to a row whose last sequence is `before`."""
        kept = start if before is None else max(start, self._shared_by(before, index + 1))
        return len(self.sequences[index].tokens) - kept

    def _tokens(self, low: int, high: int, start: int) -> int:
        """Tokens of the trie of [low, high) after `start`."""
        lengths = sum(len(s.tokens) for s in self.sequences[low:high])
        return lengths - sum(self.shared[low + 1 : high]) - start

    def _shared_by(self, low: int, high: int) -> int:
        """Length of the common prefix of sequences [low, high)."""
        return min(self.shared[low + 1 : high], default=len(self.sequences[low].tokens))

    def _children(self, low: int, high: int, branch: int) -> list[tuple[int, int]]:
        """Ranges within [low, high) that share more than `branch` tokens."""
        edges = [low, *(i for i in range(low + 1, high) if self.shared[i] <= branch), high]
        return list(pairwise(edges))
