"""What a model without some layers looks like once its gaps are folded into the projections before them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from dropformer.metrics.repair.independent import IndependentRefit, RefitTarget, Unit
from dropformer.metrics.repair.refit import gaps
from dropformer.prune.architecture import Architecture, Layer


@dataclass(frozen=True)
class GapRefits:
    """The refitted projections of any set of layers that goes, each gap fitted once (`Apart`)."""

    architecture: Architecture
    apart: IndependentRefit

    def modules(self, gone: Sequence[Layer], mapped: Collection[Layer] = ()) -> dict[str, nn.Module]:
        """Path -> refitted projection.  `mapped` layers keep something in their place, and no projection."""
        found = {}
        for layer, lost in gaps(self.architecture, [g for g in gone if g not in mapped]).items():
            reach = self._reaches.get(layer)
            units = self._units(reach, lost)
            if reach is not None and units and layer not in mapped:
                found[reach.slot.path] = self.apart.module(reach, units)
        return found

    def cover(self, gone: Sequence[Layer], projections: Collection[Layer]) -> bool:
        """Were moments taken for every gap that these layers leave behind a projection?"""
        return all(
            {layer for unit in self._units(self._reaches.get(where), lost) for layer in unit} == set(lost)
            for where, lost in gaps(self.architecture, gone).items()
            if where in projections
        )

    @property
    def _reaches(self) -> Mapping[Layer, RefitTarget]:
        return {reach.slot.layer: reach for reach in self.apart.reaches}

    def _units(self, reach: RefitTarget | None, lost: Sequence[Layer]) -> list[Unit]:
        return [unit for unit in reach.units if set(unit) <= set(lost)] if reach else []
