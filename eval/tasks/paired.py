"""Paired comparison of two models per question.

Both models answer the same questions, so the test is paired: McNemar's exact test (Quinn McNemar, Psychometrika
12, 1947) tests whether the questions that only one of them answers correctly split evenly. It detects differences
that two separate standard errors hide.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TypeVar

from dropformer.prune.artifact import FrozenRecord
from dropformer.prune.errors import EvaluationError

Q = TypeVar("Q", bound=Hashable)


class Paired(FrozenRecord):
    """Dense against pruned on `questions` questions.

    lost: only dense is correct; gained: only pruned. p_value: McNemar's, exact, two-sided. retained: pruned accuracy
    over dense, None if dense has 0; its standard error by the delta method, paired. difference: pruned minus dense
    accuracy, with its paired standard error.
    """

    questions: int
    dense: float
    pruned: float
    lost: int
    gained: int
    p_value: float
    difference: float
    difference_stderr: float
    retained: float | None
    retained_stderr: float | None

    @property
    def unseen(self) -> float:
        """Upper 95% bound of the share of changed answers if none of these changed: 1 - 0.05^(1/n).

        About 3 / n, the rule of three (Hanley and Lippman-Hand, JAMA 249, 1983): 5.1% for 57 questions.
        """
        return 1 - 0.05 ** (1 / self.questions)

    @property
    def kept(self) -> str:
        """`97.5% ± 1.2% (p = 0.04)`; of equal answers, which have no spread, how many might still differ."""
        if self.retained is None:
            return "n/a"
        if not self.lost and not self.gained:
            return f"{self.retained:.1%} (no answer of {self.questions} changed; up to {self.unseen:.1%} may, at 95%)"
        return f"{self.retained:.1%} ± {self.retained_stderr:.1%} (p = {self.p_value:.2g})"

    def __str__(self) -> str:
        return f"{self.dense:.1%} → {self.pruned:.1%}, retained {self.kept}"


def compare(dense: Mapping[Q, bool], pruned: Mapping[Q, bool]) -> Paired:
    """Compares two models' correctness, keyed by question.

    Raises EvaluationError unless both answered exactly the same questions, at least one.
    """
    if not dense or dense.keys() != pruned.keys():
        raise EvaluationError(
            f"the two models answered {len(dense)} and {len(pruned)} questions, "
            f"{len(dense.keys() & pruned.keys())} of them the same; a paired test needs the same ones: "
            "use one task, limit and seed for both"
        )
    pairs = [(bool(dense[key]), bool(pruned[key])) for key in dense]
    lost = sum(one and not two for one, two in pairs)
    gained = sum(two and not one for one, two in pairs)
    return _paired(len(pairs), sum(one for one, _ in pairs), lost, gained)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value of `lost` against `gained` discordant pairs under a fair coin."""
    n, k = lost + gained, min(lost, gained)
    if lost == gained:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * math.exp(math.log(tail) - n * math.log(2)))


def _paired(n: int, right: int, lost: int, gained: int) -> Paired:
    """From counts: n questions, `right` by dense, and the discordant ones."""
    dense, pruned = right / n, (right - lost + gained) / n
    difference = pruned - dense
    variance = ((lost + gained) / n - difference**2) / max(n - 1, 1)
    retained, stderr = None, None
    if right:
        retained = pruned / dense
        stderr = _ratio_stderr(n, dense, pruned, both=(right - lost) / n)
    return Paired(
        questions=n,
        dense=dense,
        pruned=pruned,
        lost=lost,
        gained=gained,
        p_value=mcnemar(lost, gained),
        difference=difference,
        difference_stderr=math.sqrt(max(variance, 0.0)),
        retained=retained,
        retained_stderr=stderr,
    )


def _ratio_stderr(n: int, dense: float, pruned: float, both: float) -> float:
    """Standard error of pruned / dense, two means over the same n questions, `both` right in both.

    Delta method: Var(q / p) = (Var q - 2 r Cov(p, q) + r² Var p) / p², r = q / p.
    """
    ratio = pruned / dense
    covariance = both - dense * pruned
    variance = pruned * (1 - pruned) - 2 * ratio * covariance + ratio**2 * dense * (1 - dense)
    return math.sqrt(max(variance, 0.0) / max(n - 1, 1)) / dense
