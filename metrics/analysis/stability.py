"""When is the set of layers to drop settled?  Ask the bootstrap, over calibration windows.

The windows are a random sample of the text.  Drawing as many windows again, with replacement, and
choosing anew shows what another sample of this size would have chosen (Efron, Annals of Statistics 7,
1979).  The set is settled once at least `AGREEMENT` of the resamples choose the very same layers, at
`CHECKS` checks in a row: looking again and again until it fits would otherwise stop by luck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropformer.metrics.analysis.analyze import means
from dropformer.metrics.analysis.capture import WindowScores
from dropformer.metrics.analysis.scores import Settled
from dropformer.prune.architecture import Layer
from dropformer.prune.choosing import choose
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import Outline
from dropformer.prune.spec import parse_spec

RESAMPLES = 200
AGREEMENT = 0.99
CHECKS = 2
FIRST = 8  # fewer windows than this say little about how windows vary
GROWTH = 1.25  # from one check to the next


def check_spec(spec: str) -> None:
    """Raises PlanError for a spec that names its layers: no window has a say in it."""
    if any(selector.published or selector.indices is not None for selector in parse_spec(spec)):
        raise PlanError(f"`{spec}` names its layers, so there is nothing to settle; give counts, as in attn:8")


@dataclass
class Stopper:
    """Decides after each round whether `spec` is settled.  All processes decide alike: the draws are seeded."""

    outline: Outline
    layers: Sequence[Layer]
    spec: str
    samples: int
    keep: tuple[int, ...] = ()
    _checked: int = 0
    _last: frozenset[Layer] = frozenset()
    _agreed: int = 0

    def settled(self, rows: WindowScores) -> Settled | None:
        """What was settled, or None to go on.  `rows` are those of the first windows, in their order.

        Checks are made at fixed numbers of windows, so that the answer depends neither on how many windows
        ran at once nor on whether a run was interrupted.
        """
        for n in schedule(len(rows)):
            if n > self._checked and self._check(first(rows, n)):
                return self._settled(first(rows, n))
        return None

    def _check(self, rows: WindowScores) -> bool:
        self._checked = len(rows)
        chosen, share = self.agreement(rows)
        if share < AGREEMENT:
            self._agreed = 0
        else:
            self._agreed = self._agreed + 1 if chosen == self._last else 1
        self._last = chosen
        return self._agreed >= CHECKS

    def agreement(self, rows: WindowScores) -> tuple[frozenset[Layer], float]:
        """The set that these rows choose, and the share of resamples that choose the same.

        Counting ends, with a share below `AGREEMENT`, as soon as too many have chosen otherwise.
        """
        chosen, others = self._choose(means(rows)), 0
        for drawn, similarity in enumerate(resampled(rows, RESAMPLES), 1):
            others += self._choose(similarity) != chosen
            if others > (1 - AGREEMENT) * RESAMPLES:
                return chosen, 1 - others / drawn
        return chosen, 1 - others / RESAMPLES

    def _choose(self, similarity: Tensor) -> frozenset[Layer]:
        by_layer = dict(zip(self.layers, similarity.tolist(), strict=True))
        return frozenset(choose(self.outline, self.spec, by_layer, self.keep))

    def _settled(self, rows: WindowScores) -> Settled:
        _, share = self.agreement(rows)
        return Settled(spec=self.spec, windows=len(rows), samples=self.samples, tokens=rows.total(), agreement=share)


def schedule(windows: int) -> Iterator[int]:
    """The numbers of windows at which to look, up to `windows`: 8, 10, 12, 15, 18, 22, ..."""
    n = FIRST
    while n <= windows:
        yield n
        n = max(n + 1, int(n * GROWTH))


def first(rows: WindowScores, n: int) -> WindowScores:
    """The rows of the first n windows."""
    return WindowScores(rows.sums[:n], rows.tokens[:n])


def resampled(rows: WindowScores, times: int) -> Tensor:
    """Similarity from windows drawn with replacement, [times, layers] float64.

    Deviations from the mean are widened by sqrt(n / (n - 1)), by which the bootstrap is too narrow.
    """
    n = len(rows)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(n, (times, n), generator=generator)
    counts = torch.zeros(times, n, dtype=torch.float64).scatter_add_(
        1, draws, torch.ones(times, n, dtype=torch.float64)
    )
    drawn = (counts @ rows.sums) / (counts @ rows.tokens.double())
    center = means(rows)
    return center + (drawn - center) * (n / max(n - 1, 1)) ** 0.5
