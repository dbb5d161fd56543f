"""The repairs by name, in the order in which they apply.  A new one is one file and one entry.  Light: no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dropformer.prune.registry import Registry, imported

_HERE = "dropformer.metrics.repair"


@dataclass(frozen=True)
class Training:
    """Settings of repairs that train: passes over the calibration, rank of adapters.  None: the repair's own."""

    epochs: int | None = None
    rank: int | None = None

    @property
    def given(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class RepairEntry:
    """One repair.

    `fit` is a `base.RepairMethod`, `foresee` a `base.ForesightMethod`, or "module:name" of one; without `foresee` a
    search measures unrepaired candidates.  `passes`: approximate forward passes, for the progress bar, and `per_epoch`
    those of each of its `epochs`.  `whole`: it trains through the whole model, so weights cannot be loaded block by
    block.  `maps`: it replaces attention layers by linear maps, which not every export format can hold.  `afresh`: it
    starts with norms as they were, without what earlier repairs made of their weights.  `trains`: the fields of
    `Training` that it takes.
    """

    summary: str
    fit: str | Callable
    foresee: str | Callable | None = None
    whole: bool = False
    maps: bool = False
    afresh: bool = False
    passes: float = 1.0
    per_epoch: float = 0.0
    epochs: int = 0
    trains: tuple[str, ...] = ()

    def passes_of(self, training: Training) -> float:
        """Forward passes with these settings."""
        return self.passes + self.per_epoch * (self.epochs if training.epochs is None else training.epochs)

    @property
    def searched(self) -> bool:
        return self.foresee is not None

    def method(self) -> Callable[..., Any]:
        return imported(self.fit)

    def foresight(self) -> Callable[..., Any]:
        return imported(self.foresee)


REPAIRS: Registry[RepairEntry] = Registry(
    "--repair",
    {
        "linear": RepairEntry(
            "a linear map in the place of each dropped attention layer",
            f"{_HERE}.linear:fit_maps",
            f"{_HERE}.linear:foresee_maps",
            maps=True,
        ),
        "refit": RepairEntry(
            "ridge refit of what writes into the residual stream before each gap",
            f"{_HERE}.refit:fit_gaps",
            f"{_HERE}.refit:foresee_gaps",
        ),
        "refit-all": RepairEntry(
            "the same for everything behind the first gap, in order of depth, on the pruned model's own stream",
            f"{_HERE}.sequential:fit_all",
            passes=1.8,
        ),
        "distill": RepairEntry(
            "blocks around each gap trained one by one to give the dense stream, in whatever form they have",
            f"{_HERE}.distill:fit_blocks",
            afresh=True,
            passes=2.0,
            per_epoch=1.2,
            epochs=2,
            trains=("epochs",),
        ),
        "lora": RepairEntry(
            "adapters distilled from the dense model and merged",
            f"{_HERE}.lora:fit_adapters",
            whole=True,
            per_epoch=2.0,
            epochs=2,
            trains=("epochs", "rank"),
        ),
    },
)
