"""Named strategies (`--quality`): metric, selection and repairs.  Light: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dropformer.metrics.repair.registry import REPAIRS, Training
from dropformer.metrics.search.registry import METRICS, SELECTIONS
from dropformer.prune.errors import PlanError

if TYPE_CHECKING:
    from dropformer.metrics.repair.slots import BranchOutput
    from dropformer.metrics.search.budget import Latency
    from dropformer.prune.choosing import PublishedLists
    from dropformer.prune.rungs.registry import Rung


@dataclass(frozen=True)
class Strategy:
    """How layers are selected and repaired.

    `aware`: a search measures candidates with foreseen repairs, not unrepaired.  `width`: candidates measured in each
    round of `greedy` after the first; `refine`: rounds of swaps.  KL is measured at every `stride`-th position at most,
    on at most `cost_windows` windows, shortened so that the search takes about `search_passes` forward passes over the
    calibration windows.  `trains`: where no projection can be refitted before a gap, `distill` takes the place of
    `refit-all` (`behind`).
    """

    metric: str = "similarity"
    select: str = "one-shot"
    repair: tuple[str, ...] = ()
    aware: bool = True
    width: int = 4
    refine: int = 0
    stride: int = 4
    cost_windows: int = 4
    search_passes: float = 1.5
    training: Training = field(default_factory=Training)
    trains: bool = False

    @property
    def searches(self) -> bool:
        """Whether candidates are measured on separate windows."""
        return SELECTIONS[self.select].measures or self.refine > 0

    @property
    def wording(self) -> str:
        """The selection in words: `similarity`, `iterative angular`, `greedy kl, refined`."""
        found = {"one-shot": self.metric, "greedy": "greedy kl"}.get(self.select, f"{self.select} {self.metric}")
        return found + (", refined" if self.refine else "")

    def behind(self, outputs: Iterable[BranchOutput]) -> tuple[str, ...]:
        """The repairs of a drop, from the branches' outputs before its gaps; where all are projections, as asked for.

        A norm's weights are all that a closed form can change behind a norm, and nothing among experts.  Training is
        worth more there (Gemma-3-270M less four attention layers: 1.28 times the perplexity, refitted norms 1.45).
        """
        if not self.trains or all(output.closed for output in outputs):
            return self.repair
        return REPAIRS.in_order({*self.repair, "distill"} - {"refit-all"})

    def under(self, budget: str | None) -> Strategy:
        """The strategy for a budget, which needs a greedy search.  Raises PlanError with swaps."""
        if not budget:
            return self
        if self.refine:
            raise PlanError("--refine swaps layers one for one, which a --budget need not survive; leave one out")
        return replace(self, select="greedy")


@dataclass(frozen=True)
class Target:
    """What to drop: a spec, or a budget over attention and MLP layers (decoding at `context` tokens).

    `latency`: seconds per layer, for a budget of measured time; `published`: a recipe's lists; `rungs`: rungs that a
    budget may choose for attention layers (empty: attention and MLP layers are dropped).
    """

    spec: str = ""
    keep: Sequence[int] = ()
    budget: str | None = None
    context: int = 2048
    latency: Latency | None = None
    published: PublishedLists | None = None
    rungs: tuple[Rung, ...] = ()


QUALITIES = {
    "paper": Strategy(),  # arXiv 2406.15786: one-shot similarity, nothing repaired
    "best": Strategy(select="greedy", repair=("refit", "refit-all"), trains=True),
    "healed": Strategy(select="greedy", repair=("refit", "lora")),  # distilled blocks before it add nothing (LOG.md)
    "linear": Strategy(select="greedy", repair=("linear", "refit")),
}


def quality(
    name: str | None = None,
    metric: str | None = None,
    select: str | None = None,
    repair: str | None = None,
    refine: int | None = None,
    training: Training | None = None,
) -> Strategy:
    """A named strategy with single settings changed; `repair` is a comma-separated list.  Raises PlanError."""
    if name is not None and name not in QUALITIES:
        raise PlanError(f"quality `{name}` is unknown; expected one of {', '.join(QUALITIES)}")
    found = QUALITIES[name or "paper"]
    if metric is not None:
        METRICS[metric]
        found = replace(found, metric=metric)
    if select is not None:
        SELECTIONS[select]
        found = replace(found, select=select)
    if refine is not None:
        found = replace(found, refine=refine)
    if repair is not None:
        names = {method.strip() for method in repair.split(",") if method.strip()}
        found = replace(found, repair=REPAIRS.in_order(names), trains=False)
    return replace(found, training=_training(training, found.repair)) if training else found


def _training(training: Training, repair: Sequence[str]) -> Training:
    """The settings, if one of the repairs takes each.  Raises PlanError."""
    for name in training.given:
        if not any(name in REPAIRS[method].trains for method in repair):
            takes = [method for method, entry in REPAIRS.items() if name in entry.trains]
            raise PlanError(f"--{name} is for a repair that trains; add --repair {' or '.join(takes)}, or leave it out")
    return training
