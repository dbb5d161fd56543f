"""Expected tokens per second of speculative decoding over those of the dense model alone (arXiv 2211.17192)."""

from __future__ import annotations

from collections.abc import Callable

MOST = 12  # tokens drafted at a time
PAYS = 1.05  # the least expected speed-up at which a draft pays

Verify = Callable[[int], float]
"""Number of tokens -> cost of a dense pass over them, in dense decode steps."""


def one_step(_tokens: int) -> float:
    """Verifying costs one decode step, if reading weights and cache takes all the time."""
    return 1.0


def round_tokens(acceptance: float, drafted: int) -> float:
    """Mean tokens per round: 1 + a + a^2 + ... + a^g; for a = 0.8 and g = 3, 2.95."""
    return sum(acceptance**i for i in range(drafted + 1))


def speedup(acceptance: float, drafted: int, cost: float, verify: Verify = one_step) -> float:
    """(1 - a^(g+1)) / ((1 - a) (g c + v)): theorem 3.8 of arXiv 2211.17192, where v is 1.

    acceptance: a, the probability that a drafted token is accepted, independent of the others.  cost: c, a draft step
    over a dense decode step.  verify: v of g + 1 tokens.  For a = 0.9, g = 4, c = 0.5: 4.10 / 3 = 1.37.
    """
    return round_tokens(acceptance, drafted) / (drafted * cost + verify(drafted + 1))


def curve(acceptance: float, cost: float, verify: Verify = one_step) -> dict[int, float]:
    """The speed-up at 1 to MOST drafted tokens."""
    return {g: speedup(acceptance, g, cost, verify) for g in range(1, MOST + 1)}


def best(acceptance: float, cost: float, verify: Verify = one_step) -> tuple[int, float]:
    """The number of drafted tokens (1 to MOST) with the greatest speed-up, and that speed-up."""
    return max(curve(acceptance, cost, verify).items(), key=lambda found: found[1])


def needed_cost(acceptance: float, target: float = PAYS) -> float:
    """The greatest c at which this acceptance reaches the target, if verifying costs a step; below 0 if none does."""
    return max((round_tokens(acceptance, g) / target - 1) / g for g in range(1, MOST + 1))


def needed_acceptance(cost: float, target: float = PAYS, verify: Verify = one_step) -> float | None:
    """The least acceptance, in hundredths, at which this cost reaches the target; None if even 1 does not."""
    return next((a / 100 for a in range(101) if best(a / 100, cost, verify)[1] >= target), None)
