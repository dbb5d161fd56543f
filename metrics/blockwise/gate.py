"""The gate: a repair is kept only if it lowers perplexity on text of a domain that was not fitted on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dropformer.metrics.blockwise.divergence import DenseReference
from dropformer.metrics.blockwise.variant import Changes, Variant


@dataclass(frozen=True)
class Gate:
    """Perplexity on validation text: dense, without and with a repair."""

    method: str
    dense: float
    before: float
    after: float

    @property
    def passed(self) -> bool:
        return self.after < self.before

    def __str__(self) -> str:
        verdict = "kept" if self.passed else "not kept"
        return (
            f"{self.method}: perplexity {self.before:.2f} -> {self.after:.2f} on other text "
            f"(dense {self.dense:.2f}), {verdict}"
        )


class Gating:
    """Perplexity on validation windows, measured once for the dense model and for each set of changes.

    Time: a dense pass, and per set of changes a pass from the first changed block on.
    """

    def __init__(self, dense: DenseReference, variant: Callable[[Changes], Variant]) -> None:
        self.dense, self.variant = dense, variant
        self._measured: dict[int, tuple[Changes, float]] = {}

    def __call__(self, method: str, before: Changes, after: Changes) -> Gate:
        return Gate(method, self.dense.divergence.perplexity, self.perplexity(before), self.perplexity(after))

    def perplexity(self, changes: Changes) -> float:
        if id(changes) not in self._measured:
            self._measured[id(changes)] = changes, self.dense.compare_each([self.variant(changes)])[0].perplexity
        return self._measured[id(changes)][1]
