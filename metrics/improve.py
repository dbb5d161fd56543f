"""Choose what goes and repair what stays: the steps behind --metric, --select, --budget and --repair."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from dropformer.metrics.analyze import evaluating, proven
from dropformer.metrics.apart import Apart
from dropformer.metrics.budget import meter, parse_budget, within
from dropformer.metrics.damage import Dense, dropped_modules
from dropformer.metrics.importance import METRICS, Bench
from dropformer.metrics.lockstep import Lockstep
from dropformer.metrics.projection import projections
from dropformer.metrics.quality import Quality, Request
from dropformer.metrics.repair import Gate, Repair, gate, tensors_of
from dropformer.metrics.repair_linear import linear_forms, linear_modules
from dropformer.metrics.repair_refit import all_slots, gap_slots
from dropformer.metrics.repair_scale import scale_modules
from dropformer.metrics.select import KL, Choice, Count, greedy, iterative, refine
from dropformer.metrics.stepping import Stepper
from dropformer.metrics.windows import Windows
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.census import outline_of
from dropformer.prune.outline import Outline
from dropformer.prune.plan import Plan, choose, make_plan, parse_spec

Tell = Callable[[str], None]


@dataclass
class Improver:
    """A model on calibration windows of one or more kinds of text, ready to choose and to repair.

    Windows run one at a time.  `seconds` collects what each step took.
    """

    model: nn.Module
    data: Sequence[Windows]
    quality: Quality = field(default_factory=Quality)
    tell: Tell = lambda text: None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.architecture: Architecture = proven(self.model)
        self.outline: Outline = outline_of(self.model, self.architecture)
        batches, scored, groups = [], [], []
        for group, windows in enumerate(self.data):
            for n, (inputs, counts) in enumerate(windows.batches(1)):
                batches.append(inputs)
                scored.append(None if counts.all() else counts)
                groups.append(group if len(self.data) > 1 else n % 2)  # one kind of text: its halves judge each other
        self.groups = groups
        self.bench = Bench(
            Stepper(self.model, self.architecture, batches), self.architecture, scored, self.quality.stride
        )
        self._dense: Dense | None = None

    @property
    def cost(self) -> KL:
        """KL to the dense model on the first windows of each kind, whose streams are kept."""
        if self._dense is None:
            few = self._few(self.quality.cost_windows)
            batches = [self.bench.stepper.batches[i] for i in few]
            stepper = Stepper(self.model, self.architecture, batches)
            self._dense = Dense(stepper, self.quality.stride, [self.bench.scored[i] for i in few])
            self._kl = KL(self._dense, self.architecture)
            self._kl_linear = KL(self._dense, self.architecture, self.standing)
        return self._kl_linear if "linear" in self.quality.repair else self._kl

    def standing(self, gone: Sequence[Layer]) -> dict[str, nn.Module]:
        """What stands in for dropped layers: a linear map for each attention layer named as such."""
        maps = [layer for layer in gone if layer.kind == "attn"]
        modules = dropped_modules(self.architecture, [layer for layer in gone if layer not in maps])
        for layer in maps:
            modules |= self.maps[layer]
        return modules

    @cached_property
    def maps(self) -> dict[Layer, dict[str, nn.Module]]:
        """The fitted linear map of every attention layer, from one dense pass."""
        layers = [layer for layer in self.architecture.layers() if layer.kind == "attn"]
        standing, slots = linear_modules(self.model, self.architecture, layers, self.width)
        with self._timed("maps"):
            fitted = Apart(self.bench.stepper, self.architecture, [], layers, self.groups).refit(slots, standing)
        modules = {**standing, **fitted}
        return {layer: {path: modules[path] for path in self._forms(layer)} for layer in layers}

    @property
    def width(self) -> int:
        return self.bench.stepper.start(0).shape[-1]

    def _forms(self, layer: Layer) -> dict[str, Any]:
        return linear_forms(self.model, self.architecture, layer, self.width)

    def _few(self, count: int) -> list[int]:
        """So many windows, in turn from each kind of text."""
        rank = [self.groups[:i].count(group) for i, group in enumerate(self.groups)]
        return sorted(range(len(rank)), key=lambda i: (rank[i], self.groups[i]))[:count]

    def choose(self, request: Request) -> tuple[list[Layer], dict[Layer, float]]:
        """The layers to drop, and the score or cost that each was chosen by (higher goes first)."""
        with self._timed("select"), evaluating(self.model):
            if request.budget:
                found = self._within(request)
                return list(found.layers), {}
            scores: dict[Layer, float] = {}
            if self.quality.select == "one-shot":
                if any(s.indices is None for s in parse_spec(request.spec)):
                    scores = METRICS[self.quality.metric](self.bench)
                layers = choose(self.outline, request.spec, scores, request.keep)
            else:
                layers = self._searched(request)
            if self.quality.refine:
                everything = self._candidates(("attn", "mlp", "block"), "", request.keep)
                layers = list(refine(layers, everything, self.cost, self.quality.refine).layers)
            return layers, scores

    def _searched(self, request: Request) -> list[Layer]:
        """Layers by `iterative` or `greedy`, blocks first, each item of the spec on top of those before it."""
        chosen: list[Layer] = []
        for selector in sorted(parse_spec(request.spec), key=lambda s: s.kind != "block"):
            none = dict.fromkeys(self.architecture.layers(), 0.0)
            free = choose(self.outline, str(selector), none, request.keep)  # says what is wrong with the spec
            if selector.indices is not None:
                chosen += free
                continue
            candidates = self._candidates(selector.kinds, selector.stack, request.keep)
            chosen += self._search(candidates, len(free), chosen).layers
        return chosen

    def _search(self, candidates: Sequence[Layer], count: int, start: Sequence[Layer]) -> Choice:
        if self.quality.select == "iterative":
            return iterative(self.bench, candidates, count, start)
        return greedy(candidates, Count(count), self.cost, start, self.quality.width)

    def _candidates(self, kinds: Sequence[str], stack: str, keep: Sequence[int]) -> list[Layer]:
        kept = {k % self.outline.stack(stack).blocks for k in keep}
        layers = [layer for kind in kinds for layer in self.outline.layers(kind, stack)]
        return [layer for layer in layers if layer.index not in kept and self.architecture.branches(layer)]

    def _within(self, request: Request) -> Choice:
        budget = parse_budget(request.budget or "")
        candidates = self._candidates(("attn", "mlp"), "", request.keep)
        goal = meter(budget, self.outline, candidates, request.context)
        return within(goal, candidates, self.cost, self.quality.width)

    def repair(self, gone: Sequence[Layer], other: Windows | None = None) -> tuple[Repair, Mapping[str, nn.Module]]:
        """Repair a model without `gone`, method by method, each kept only if it helps on `other` text.

        Without `other` nothing is gated.  Also gives the modules that stand in for the model's own.
        """
        dense = None
        if other is not None and self.quality.repair:
            inputs = [batch for batch, _ in other.batches(1)]
            dense = Dense(Stepper(self.model, self.architecture, inputs), self.quality.stride)
        modules: Mapping[str, nn.Module] = dropped_modules(self.architecture, gone)
        gates: list[Gate] = []
        mapped: dict[Layer, Any] = {}
        with evaluating(self.model):
            for method in self.quality.repair:
                with self._timed(method):
                    tried, maps = self._try(method, gone, modules, mapped)
                passed = True
                if dense is not None:
                    gates.append(gate(dense, method, modules, tried))
                    self.tell(str(gates[-1]))
                    passed = gates[-1].passed
                if passed:
                    modules, mapped = tried, {**mapped, **maps}
        return Repair(tensors_of(modules), mapped, tuple(gates)), modules

    def _try(
        self, method: str, gone: Sequence[Layer], modules: Mapping[str, nn.Module], mapped: Mapping[Layer, Any]
    ) -> tuple[dict[str, nn.Module], dict[Layer, Any]]:
        """The modules that stand in once a method has been applied, and the layers that it mapped."""
        found = {layer: slot for layer, slot in projections(self.bench.stepper).items() if layer not in mapped}
        branches = self.outline.branch_layers(gone)
        left = [layer for layer in branches if layer not in mapped]
        if method == "scale":
            return {**modules, **scale_modules(self.bench, left, found)}, {}
        if method == "linear":
            maps = [layer for layer in gone if layer.kind == "attn"]
            return self.standing(gone), {layer: self._relative(layer, self._forms(layer)) for layer in maps}
        standing = {path: module for path, module in modules.items() if any(True for _ in module.parameters())}
        if method == "refit":
            slots = gap_slots(self.architecture, left, found)
            fitted = Apart(self.bench.stepper, self.architecture, left, list(mapped), self.groups).refit(
                slots, standing
            )
            return {**modules, **fitted}, {}
        slots = all_slots(self.architecture, left, found)
        return Lockstep(self.bench.stepper, self.architecture, left, self.groups, standing).refit(slots), {}

    def _relative(self, layer: Layer, forms: Mapping[str, Any]) -> dict[str, Any]:
        prefix = self.architecture.block(layer).path + "."
        return {path.removeprefix(prefix): form for path, form in forms.items()}

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


def improve(
    improver: Improver, ref: ModelRef, request: Request, other: Windows | None = None
) -> tuple[Plan, Repair, Mapping[str, nn.Module]]:
    """A plan by the improver's quality settings, its repair, and the modules that stand in for the model's own.

    Raises PlanError, CalibrationError or ArchitectureError.
    """
    layers, scores = improver.choose(request)
    repair, modules = improver.repair(layers, other)
    quality = improver.quality
    metric = quality.metric if quality.select == "one-shot" and not request.budget else f"{quality.select} kl"
    calibration = improver.data[0].ref.model_dump()
    fields = {"keep": list(request.keep), "metric": metric, "calibration": calibration}
    spec = request.spec or str(parse_budget(request.budget or ""))
    return make_plan(improver.outline, ref, spec, layers, scores, **fields), repair, modules
