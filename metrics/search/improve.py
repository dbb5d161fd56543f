"""Selection and repair by the KL divergence from the dense model: --metric, --select, --budget and --repair."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dropformer.metrics.analysis.analyze import proven
from dropformer.metrics.blockwise.divergence import DenseReference
from dropformer.metrics.blockwise.layer_metrics import MetricContext, Ranking
from dropformer.metrics.blockwise.provider import InMemory, Source, provider_for
from dropformer.metrics.blockwise.runner import BlockRunner, check_blockwise
from dropformer.metrics.blockwise.variant import Changes, Variant, variant
from dropformer.metrics.blockwise.work import Work
from dropformer.metrics.calibration.windows import Windows, named_texts
from dropformer.metrics.offload.keeper import Keeper
from dropformer.metrics.repair.base import Foresight, Repair, RepairContext
from dropformer.metrics.repair.linear import UNMAPPED, fit_maps, mappable
from dropformer.metrics.repair.registry import REPAIRS
from dropformer.metrics.repair.slots import branch_outputs
from dropformer.metrics.search.budget import parse_budget
from dropformer.metrics.search.calibration import GATE_SHARE, Batch, batches_of, search_size, shortened
from dropformer.metrics.search.registry import METRICS, SELECTIONS
from dropformer.metrics.search.repairing import repaired
from dropformer.metrics.search.select import KL, Greedily, refine
from dropformer.metrics.search.selections import shortlist, within_budget
from dropformer.metrics.search.strategy import Strategy, Target
from dropformer.progress import Tell, silent
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.choosing import choose_forms, unprotected
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import ArchitectureError, ModelError, PlanError
from dropformer.prune.loading.parts import evaluating
from dropformer.prune.outline import Outline
from dropformer.prune.plan import Plan, make_plan
from dropformer.prune.samples.inputs import writes_text
from dropformer.prune.spec import parse_spec


@dataclass
class Improver:
    """A model on calibration windows of one or more domains, for selection and repair.

    All windows pass a block before the next is entered; `keeper` holds streams and fitted changes and moves them to
    files beyond its allowance.  `work` counts forward passes and reports progress.  Raises ModelError for a repair that
    needs the whole model in memory if it is not.
    """

    model: nn.Module
    data: Sequence[Windows]
    quality: Strategy = field(default_factory=Strategy)
    tell: Tell = silent
    source: Source | None = None
    keeper: Keeper = field(default_factory=Keeper)
    known: Architecture | None = None

    def __post_init__(self) -> None:
        self.provider = self.source.provider if self.source else provider_for(self.model)
        self._check_repairs()
        self.architecture = self.source.architecture if self.source else self.known or proven(self.model)
        traced = self.source.blueprint if self.source else self.model
        self.outline: Outline = summarize(traced, self.architecture)
        self.outputs = branch_outputs(traced, self.architecture)
        alone = self.quality.cost_windows if self.quality.searches else 0
        self.parts: list[Batch] = batches_of(self.data, _device(self.model), alone)
        self.groups = [part.group for part in self.parts]
        inputs = [part.inputs for part in self.parts]
        runner = BlockRunner(self.model, self.architecture, inputs, self.provider, None, self.keeper)
        if inputs and not self.source:
            with evaluating(self.model):
                check_blockwise(runner, self.architecture)
        self.work: Work = runner.work
        scored = runner.counted = [part.scored for part in self.parts]
        self.bench = MetricContext(runner, self.architecture, scored, self.quality.stride)
        self._evaluations = len(self.architecture.layers()) / 2
        self._dense: DenseReference | None = None
        self._foreseen: dict[str, Foresight] = {}
        self._costs: dict[Any, KL] = {}
        self._rankings: dict[str, Ranking] = {}
        self._memory: dict[tuple[int, ...], dict[str, Any]] = {}

    def _check_repairs(self) -> None:
        if not writes_text(self.model):
            raise ModelError(
                f"{type(self.model).__name__} writes no text, so neither KL nor perplexity can choose or repair; "
                "choose by one-shot similarity"
            )
        for name in self.quality.repair:
            if REPAIRS[name].whole and not isinstance(self.provider, InMemory):
                raise ModelError(
                    f"--repair {name} trains through the whole model, which must be in memory; leave out --memory and "
                    "offloading by --device-map, or repair by refit"
                )

    def ranking(self, metric: str) -> Ranking:
        """The scores by a metric; slow metrics, which run the model for each layer, use the windows of a search."""
        if metric not in self._rankings:
            entry, bench = METRICS[metric], self.bench
            if entry.slow:
                bench = replace(bench, runner=self.dense.runner, scored=self.dense.scored)
            self._rankings[metric] = Ranking(bench, entry.method())
        return self._rankings[metric]

    @property
    def dense(self) -> DenseReference:
        """The dense model, with its streams, on the first windows of each domain, on which a search measures."""
        if self._dense is None:
            size = self._search_size()
            parts = [shortened(self.parts[i], size.windows, size.length) for i in self._few(size.windows)]
            runner = self.bench.runner.like([inputs for inputs, _ in parts], self.architecture)
            stride = max(1, min(self.quality.stride, runner.tokens // 512))
            self._dense = DenseReference(runner, stride, [scored for _, scored in parts])
        return self._dense

    def _search_size(self) -> Any:
        length = max(windows.ids.shape[1] for windows in self.data)
        how = self.quality
        tokens = self.bench.runner.tokens
        return search_size(tokens, length, len(self.data), self._evaluations, how.search_passes, how.cost_windows)

    @property
    def cost(self) -> KL:
        """KL to the dense model with the foreseen repairs in place."""
        key = tuple(self._foreseen)
        if key not in self._costs:
            self._costs[key] = KL(self.dense, self.foreseen)
        return self._costs[key]

    @property
    def bare(self) -> KL:
        """KL to the dense model without repairs, on half of the search's windows."""
        if "bare" not in self._costs:
            half = range(max(1, min(len(self.dense.runner), max(len(self.data), len(self.dense.runner) // 2))))
            self._costs["bare"] = KL(self.dense, partial(variant, self.model, self.architecture), half)
        return self._costs["bare"]

    def foreseen(self, dropped: Sequence[Layer]) -> Variant:
        """The model without some layers, with the repairs that were fitted for a search."""
        changes = Changes()
        for foresight in self._foreseen.values():
            changes |= foresight(dropped, changes)
        return variant(self.model, self.architecture, dropped, changes)

    @property
    def fitted_on(self) -> tuple[int, ...]:
        """Batches to fit on: all except those of a search, unless these are more than half of the windows."""
        few = set(self._few(self._search_size().windows)) if self.quality.searches else set()
        held = sum(self.parts[i].windows for i in few)
        everything = 2 * held > sum(part.windows for part in self.parts)
        return tuple(i for i in range(len(self.groups)) if everything or i not in few)

    def _few(self, count: int) -> list[int]:
        """The first `count` batches, taken from the domains in turn."""
        domains = [part.domain for part in self.parts]
        rank = [domains[:i].count(domain) for i, domain in enumerate(domains)]
        return sorted(range(len(rank)), key=lambda i: (rank[i], domains[i]))[:count]

    def context(self, dropped: Sequence[Layer] = (), before: Changes | None = None) -> RepairContext:
        """The context of a repair."""
        memory = self._memory.setdefault(self.fitted_on, {})
        return RepairContext(
            self.bench.runner, self.architecture, self.outline, self.groups, self.fitted_on, self.outputs, dropped,
            before or Changes(), self.tell, memory, self.quality.training.given,
        )  # fmt: skip

    def steps(self, chooses: bool = True, budget: bool = False) -> int:
        """Approximate block-steps (blocks x forward passes) of selection and repair, for a progress bar."""
        how = self.quality.under("kv:-1%" if budget else None)
        passes = (how.search_passes if how.searches else 1.0) if chooses else 0.0
        repairs = how.behind(self.outputs.values())
        passes += sum(REPAIRS[name].passes_of(how.training) for name in repairs) + 3 / GATE_SHARE * bool(repairs)
        return max(1, round(self.work.blocks * passes))

    def prepare(self, candidates: Sequence[Layer], count: int) -> None:
        """Fit the foreseen repairs of any `count` of the candidates, for a search."""
        self._foreseen = {}
        for name in self.quality.repair if self.quality.aware and candidates else ():
            if REPAIRS[name].searched:
                self._foreseen[name] = REPAIRS[name].foresight()(self.context(), candidates, count)
        self._costs = {key: cost for key, cost in self._costs.items() if key == "bare" or not key}

    def choose_forms(self, request: Target) -> tuple[list[Layer], list[Layer], dict[Layer, float]]:
        """The layers to drop, those of them that become linear maps, and the scores that ranked them (none: a search).

        Raises PlanError.
        """
        self.quality = self.quality.under(request.budget)
        with evaluating(self.model):
            if request.budget:
                found = within_budget(self, request, self.bench.runner.start(0).shape[-1])
                return list(found.layers), [], {}
            scores: dict[Layer, float] = {}
            entry = SELECTIONS[self.quality.select]
            if entry.pick is None and any(s.indices is None and not s.published for s in parse_spec(request.spec)):
                scores = self.ranking(self.quality.metric)()
            pick = None if entry.pick is None else partial(entry.method(), self)
            layers, maps = choose_forms(self.outline, request.spec, scores, request.keep, request.published, pick)
            return self.refined(layers, request.keep, maps), maps, scores

    def refined(
        self,
        layers: Sequence[Layer],
        keep: Sequence[int] = (),
        maps: Sequence[Layer] = (),
        cheaper: Collection[Layer] = (),
    ) -> list[Layer]:
        """The layers after the strategy's rounds of swaps, which keep the number of each kind.

        `cheaper`: layers that stay and attend to less; none of them is dropped.  Raises PlanError for swaps of layers
        of which some become linear maps.
        """
        if not self.quality.refine or not layers:
            return list(layers)
        if maps:
            raise PlanError("--refine swaps dropped layers, and would not know which are to be maps; leave one out")
        if cheaper:
            self.tell("swaps are measured with whole attention in the layers that attend to less")
        kinds = sorted({layer.kind for layer in layers})
        candidates = [c for c in unprotected(self.outline, kinds, "", keep) if self._owns_none(c, cheaper)]
        with evaluating(self.model):
            candidates = [*layers, *(c for c in shortlist(self, candidates, len(layers)) if c not in layers)]
            self.prepare(candidates, len(layers))
            return list(refine(layers, candidates, self.cost, self.quality.refine).layers)

    def _owns_none(self, layer: Layer, others: Collection[Layer]) -> bool:
        return not set(self.outline.branch_layers([layer])).intersection(others)

    def expect(self, evaluations: float) -> None:
        """Announce a search's passes over its windows, which determine how many tokens these have."""
        if self._dense is None:
            self._evaluations = evaluations

    @property
    def how(self) -> Greedily:
        """Settings of a greedy search; a round is measured in one pass if blocks are not in memory."""
        together = not isinstance(self.provider, InMemory)
        return Greedily(self.quality.width, self.cost.ahead if together else None)

    def maps(self, layers: Sequence[Layer]) -> Changes:
        """A linear map for each attention layer.  Time: a dense pass up to the last one that was not fitted before.

        Raises ArchitectureError for a layer in whose place there can be none.
        """
        for layer in layers:
            if not mappable(self.architecture, layer):
                raise ArchitectureError(f"{layer} cannot become linear: {UNMAPPED}; drop it or give it a window")
        with evaluating(self.model):
            return fit_maps(self.context(layers)) if layers else Changes()

    def repair(
        self, dropped: Sequence[Layer], other: Windows | None = None, maps: Sequence[Layer] = ()
    ) -> tuple[Repair, Variant]:
        """Repair the model without `dropped`, gated on `other` text: `repairing.repaired`."""
        return repaired(self, dropped, other, maps)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def improve(
    improver: Improver, ref: ModelRef, request: Target, other: Windows | None = None
) -> tuple[Plan, Repair, Variant]:
    """A plan by the improver's strategy, its repair, and the repaired model as a variant of the dense one.

    Raises PlanError, CalibrationError or ArchitectureError.
    """
    layers, maps, scores = improver.choose_forms(request)
    repair, variant = improver.repair(layers, other, maps)
    fields: dict[str, Any] = {"metric": improver.quality.wording, "calibration": named_texts(improver.data)}
    spec = request.spec or str(parse_budget(request.budget or ""))
    fields |= {"keep": list(request.keep), "maps": [str(layer) for layer in maps]}
    return make_plan(improver.outline, ref, spec, layers, scores, **fields), repair, variant
