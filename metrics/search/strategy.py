"""Named qualities: which metric, which search and which repairs make up a recipe.  Light: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dropformer.prune.errors import PlanError

if TYPE_CHECKING:
    from dropformer.metrics.search.budget import Latency
    from dropformer.prune.plan import PublishedLists

METRIC_NAMES = ("similarity", "angular", "relative-magnitude", "loo-kl", "loo-perplexity", "cca", "random", "reverse")
SELECTS = ("one-shot", "iterative", "greedy")
REPAIRS = ("linear", "refit", "refit-all", "scale", "lora")  # in the order in which they apply


@dataclass(frozen=True)
class Strategy:
    """How layers are chosen and what is repaired.

    `aware`: a search measures candidates with their refit or map in place, not as bare gaps.
    `width`: how many candidates a round of `greedy` measures after the first; `refine`: rounds of swaps;
    `stride`: KL is measured at every so many positions, on `cost_windows` windows.
    """

    metric: str = "similarity"
    select: str = "one-shot"
    repair: tuple[str, ...] = ()
    aware: bool = True
    width: int = 4
    refine: int = 0
    stride: int = 4
    cost_windows: int = 4

    @property
    def searches(self) -> bool:
        """Are candidates measured on windows of their own?"""
        return self.select == "greedy" or self.refine > 0

    def under(self, budget: str | None) -> Strategy:
        """These settings where a budget says how much goes: a greedy search meets it.  Raises PlanError with swaps."""
        if not budget:
            return self
        if self.refine:
            raise PlanError("--refine swaps layers one for one, which a --budget need not survive; leave one out")
        return replace(self, select="greedy")


@dataclass(frozen=True)
class Target:
    """What to drop: a spec, or a budget over attention and MLP layers (decoding at `context` tokens).

    `latency`: what each layer takes, for a budget of measured time; `published`: a recipe's lists.
    """

    spec: str = ""
    keep: Sequence[int] = ()
    budget: str | None = None
    context: int = 2048
    latency: Latency | None = None
    published: PublishedLists | None = None


QUALITIES = {
    "paper": Strategy(),  # arXiv 2406.15786: one-shot similarity, nothing repaired
    "best": Strategy(select="greedy", repair=("refit", "refit-all")),
    "healed": Strategy(select="greedy", repair=("refit", "lora")),
    "linear": Strategy(select="greedy", repair=("linear", "refit")),
}


def quality(
    name: str | None = None,
    metric: str | None = None,
    select: str | None = None,
    repair: str | None = None,
    refine: int | None = None,
) -> Strategy:
    """A named quality with single settings changed; `repair` is a comma-separated list.  Raises PlanError."""
    if name is not None and name not in QUALITIES:
        raise PlanError(f"quality `{name}` is unknown; expected one of {', '.join(QUALITIES)}")
    found = QUALITIES[name or "paper"]
    if metric is not None:
        found = replace(found, metric=_one_of("metric", metric, METRIC_NAMES))
    if select is not None:
        found = replace(found, select=_one_of("select", select, SELECTS))
    if refine is not None:
        found = replace(found, refine=refine)
    if repair is not None:
        methods = {_one_of("repair", method.strip(), REPAIRS) for method in repair.split(",") if method.strip()}
        if "scale" in methods and len(methods) > 1:
            raise PlanError("--repair scale mends what the other repairs mend; give it alone, or leave it out")
        found = replace(found, repair=tuple(method for method in REPAIRS if method in methods))
    return found


def _one_of(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise PlanError(f"--{option} `{value}` is unknown; expected one of {', '.join(known)}")
    return value
