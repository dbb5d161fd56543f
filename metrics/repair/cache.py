"""What is fitted for a model that loses layers: a linear map for each attention layer, refits for every gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from dropformer.metrics.blockwise.divergence import dropped_modules
from dropformer.metrics.blockwise.layer_metrics import MetricContext
from dropformer.metrics.repair.folding import GapRefits
from dropformer.metrics.repair.independent import IndependentRefit, RefitTarget
from dropformer.metrics.repair.linear import linear_forms, linear_modules
from dropformer.metrics.repair.projection import OutputProjection, projections
from dropformer.metrics.repair.refit import reaches
from dropformer.metrics.repair.ridge import Group
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.outline import Outline

DEPTH = 2  # how many candidates in a row a search can see refitted


@dataclass
class RepairCache:
    """Maps and refits on fixed windows, each fitted when it is asked for, and once.

    `windows`: which of the bench's to fit on; `groups` says of each of these which kind of text it is, or that
    it judges.  Time and memory: `Apart`, one pass for all maps and one for the refits of a search.
    """

    bench: MetricContext
    outline: Outline
    windows: Sequence[int]
    groups: Sequence[Group]

    def __post_init__(self) -> None:
        self.model: nn.Module = self.bench.runner.model
        self.architecture: Architecture = self.bench.architecture
        self._last: GapRefits | None = None
        self._searched: GapRefits | None = None
        self._asked: tuple[tuple[Layer, ...], int] | None = None

    def standing(self, gone: Sequence[Layer], repair: Sequence[str]) -> dict[str, nn.Module]:
        """What stands in the pruned model for the model's own modules: nothing, or repairs known beforehand."""
        maps = [layer for layer in gone if layer.kind == "attn"] if "linear" in repair else []
        modules = dropped_modules(self.architecture, [layer for layer in gone if layer not in maps])
        for layer in maps:
            modules |= self.maps[layer]
        left = self.outline.branch_layers([layer for layer in gone if layer not in maps])
        if "refit" in repair and left:
            modules |= (self._searched or self.folds(left)).modules(left, maps)
        return modules

    @cached_property
    def maps(self) -> dict[Layer, dict[str, nn.Module]]:
        """The fitted linear map of every attention layer, from one dense pass."""
        layers = [layer for layer in self.architecture.layers() if layer.kind == "attn"]
        standing, slots = linear_modules(self.model, self.architecture, layers, self.width)
        wanted = [RefitTarget(slot, standing[slot.path], ((slot.layer,),)) for slot in slots]
        apart = self._apart(wanted)
        modules = {**standing, **{reach.slot.path: apart.module(reach, reach.units) for reach in wanted}}
        return {layer: {path: modules[path] for path in self.forms(layer)} for layer in layers}

    def prepare(self, candidates: Sequence[Layer], count: int) -> None:
        """Take the moments for refits of any `count` of the candidates, which a search is to see."""
        asked = tuple(candidates), min(count, DEPTH)
        if candidates and asked != self._asked:
            self._searched, self._asked = self._folds(*asked), asked

    def folds(self, gone: Sequence[Layer]) -> GapRefits:
        """Refits for what goes: those prepared for a search where they do, else for just these layers."""
        for folds in (self._searched, self._last):
            if folds is not None and folds.cover(gone, self.slots):
                return folds
        self._last = self._folds(gone, len(gone))
        return self._last

    def _folds(self, candidates: Sequence[Layer], depth: int) -> GapRefits:
        found = reaches(self.architecture, candidates, self.slots, depth)
        wanted = [RefitTarget(slot, self.model.get_submodule(slot.path), units) for slot, units in found.items()]
        return GapRefits(self.architecture, self._apart(wanted))

    def _apart(self, wanted: Sequence[RefitTarget]) -> IndependentRefit:
        return IndependentRefit(self.bench.runner, wanted, self.windows, self.groups)

    @cached_property
    def slots(self) -> dict[Layer, OutputProjection]:
        """The projection of every branch that has one."""
        return projections(self.bench.runner)

    @property
    def width(self) -> int:
        return self.bench.runner.start(0).shape[-1]

    def forms(self, layer: Layer) -> dict[str, Any]:
        """Module path -> form for an attention layer that becomes a map."""
        return linear_forms(self.model, self.architecture, layer, self.width)
