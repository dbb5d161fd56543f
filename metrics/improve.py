"""Choose what goes and repair what stays: the steps behind --metric, --select, --budget and --repair."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import nn

from dropformer.metrics.analyze import evaluating, proven
from dropformer.metrics.apart import Apart, Reach
from dropformer.metrics.budget import meter, parse_budget, within
from dropformer.metrics.damage import Dense, dropped_modules, first_changed
from dropformer.metrics.folding import Folds
from dropformer.metrics.importance import Bench, Ranking
from dropformer.metrics.lockstep import Lockstep
from dropformer.metrics.projection import Slot, projections
from dropformer.metrics.quality import Quality, Request
from dropformer.metrics.repair import Gate, Repair, gate, tensors_of
from dropformer.metrics.repair_linear import linear_forms, linear_modules
from dropformer.metrics.repair_lora import heal, need_peft
from dropformer.metrics.repair_refit import all_slots, reaches
from dropformer.metrics.repair_scale import scale_modules
from dropformer.metrics.ridge import group_of
from dropformer.metrics.select import KL, Choice, Count, greedy, iterative, refine
from dropformer.metrics.stepping import Stepper
from dropformer.metrics.windows import Windows
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.census import outline_of
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import Outline
from dropformer.prune.plan import Plan, check_attention_left, choose, make_plan, parse_spec, unprotected

Tell = Callable[[str], None]
BUSY_CPU, BUSY_GPU = 256, 8192  # tokens in a pass beyond which more candidates at once gain nothing
DEPTH = 2  # how many candidates in a row a search can see refitted


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
        if "lora" in self.quality.repair:
            need_peft()
        self.architecture: Architecture = proven(self.model)
        self.outline: Outline = outline_of(self.model, self.architecture)
        batches, scored, kinds, groups = [], [], [], []
        for kind, windows in enumerate(self.data):
            for n, (inputs, counts) in enumerate(windows.batches(1)):
                batches.append(inputs)
                scored.append(None if counts.all() else counts)
                kinds.append(kind)
                groups.append(group_of(kind, n))
        self.kinds, self.groups = kinds, groups
        self.bench = Bench(
            Stepper(self.model, self.architecture, batches), self.architecture, scored, self.quality.stride
        )
        self._dense: Dense | None = None
        self._costs: dict[tuple[str, ...], KL] = {}
        self._folds: Folds | None = None
        self._searched_folds: Folds | None = None
        self._asked: tuple[tuple[Layer, ...], int] | None = None
        self._rankings: dict[str, Ranking] = {}

    def ranking(self, metric: str) -> Ranking:
        """The scores by a metric; those that run the model for each layer measure on the windows of a search."""
        if metric not in self._rankings:
            bench = self.bench
            if metric.startswith("loo-"):
                bench = replace(bench, stepper=self.cost.dense.stepper, scored=self.cost.dense.scored)
            self._rankings[metric] = Ranking(bench, metric)
        return self._rankings[metric]

    @property
    def cost(self) -> KL:
        """KL to the dense model on the first windows of each kind, whose streams are kept."""
        if self._dense is None:
            few = self._few(self.quality.cost_windows)
            batches = [self.bench.stepper.batches[i] for i in few]
            stepper = Stepper(self.model, self.architecture, batches)
            self._dense = Dense(stepper, self.quality.stride, [self.bench.scored[i] for i in few])
        known = self.quality.repair if self.quality.aware else ()
        foreseen = tuple(method for method in known if method in ("linear", "refit"))
        if foreseen not in self._costs:
            stands = partial(self.standing, repair=foreseen)
            stream = self.bench.stepper.start(0)
            busy = BUSY_CPU if stream.device.type == "cpu" else BUSY_GPU
            together = max(1, busy // stream.shape[:2].numel())
            self._costs[foreseen] = KL(self._dense, self.architecture, stands, together=together)
        return self._costs[foreseen]

    def standing(self, gone: Sequence[Layer], repair: Sequence[str]) -> dict[str, nn.Module]:
        """What stands in the pruned model for the model's own modules: nothing, or repairs known beforehand."""
        maps = [layer for layer in gone if layer.kind == "attn"] if "linear" in repair else []
        modules = dropped_modules(self.architecture, [layer for layer in gone if layer not in maps])
        for layer in maps:
            modules |= self.maps[layer]
        left = self.outline.branch_layers([layer for layer in gone if layer not in maps])
        if "refit" in repair and left:
            modules |= (self._searched_folds or self.folds(left)).modules(left, maps)
        return modules

    @property
    def fitted_on(self) -> list[int]:
        """The windows to fit on: all but those that a search measures its candidates on, where enough are left."""
        searching = self.quality.select == "greedy" or self.quality.refine
        few = set(self._few(self.quality.cost_windows)) if searching else set()
        return [i for i in range(len(self.groups)) if 2 * len(few) > len(self.groups) or i not in few]

    def _apart(self, slots: Sequence[Reach]) -> Apart:
        groups = [self.groups[i] for i in self.fitted_on]
        return Apart(self.bench.stepper, slots, self.fitted_on, groups)

    @cached_property
    def maps(self) -> dict[Layer, dict[str, nn.Module]]:
        """The fitted linear map of every attention layer, from one dense pass."""
        layers = [layer for layer in self.architecture.layers() if layer.kind == "attn"]
        standing, slots = linear_modules(self.model, self.architecture, layers, self.width)
        wanted = [Reach(slot, standing[slot.path], ((slot.layer,),)) for slot in slots]
        with self._timed("maps"):
            apart = self._apart(wanted)
            fitted = {reach.slot.path: apart.module(reach, reach.units) for reach in wanted}
        modules = {**standing, **fitted}
        return {layer: {path: modules[path] for path in self._forms(layer)} for layer in layers}

    def folds(self, gone: Sequence[Layer]) -> Folds:
        """Refits for what goes: those prepared for a search where they do, else for just these layers."""
        for folds in (self._searched_folds, self._folds):
            if folds is not None and folds.cover(gone, self.slots):
                return folds
        self._folds = self._prepared(gone, len(gone))
        return self._folds

    def prepare(self, candidates: Sequence[Layer], count: int) -> None:
        """Take the moments for refits of any `count` of the candidates, where a search is to see them."""
        if not self.quality.aware or "refit" not in self.quality.repair:
            return
        mapped = "linear" in self.quality.repair
        left = tuple(layer for layer in candidates if not (mapped and layer.kind == "attn"))
        asked = left, min(count, DEPTH)
        if left and asked != self._asked:
            self._searched_folds, self._asked = self._prepared(*asked), asked

    def _prepared(self, candidates: Sequence[Layer], depth: int) -> Folds:
        found = reaches(self.architecture, candidates, self.slots, depth)
        wanted = [Reach(slot, self.model.get_submodule(slot.path), units) for slot, units in found.items()]
        with self._timed("moments"):
            return Folds(self.architecture, self._apart(wanted))

    @cached_property
    def slots(self) -> dict[Layer, Slot]:
        """The projection of every branch that has one."""
        return projections(self.bench.stepper)

    @property
    def width(self) -> int:
        return self.bench.stepper.start(0).shape[-1]

    def _forms(self, layer: Layer) -> dict[str, Any]:
        return linear_forms(self.model, self.architecture, layer, self.width)

    def _few(self, count: int) -> list[int]:
        """So many windows, in turn from each kind of text."""
        rank = [self.kinds[:i].count(kind) for i, kind in enumerate(self.kinds)]
        return sorted(range(len(rank)), key=lambda i: (rank[i], self.kinds[i]))[:count]

    def choose(self, request: Request) -> tuple[list[Layer], dict[Layer, float]]:
        """The layers to drop, and the score or cost that each was chosen by (higher goes first)."""
        with self._timed("select"), evaluating(self.model):
            if request.budget:
                found = self._within(request)
                return list(found.layers), {}
            scores: dict[Layer, float] = {}
            pick = None if self.quality.select == "one-shot" else self._search
            if pick is None and any(s.indices is None and not s.published for s in parse_spec(request.spec)):
                scores = self.ranking(self.quality.metric)()
            layers = choose(self.outline, request.spec, scores, request.keep, request.published, pick)
            return self.refined(layers, request.keep), scores

    def refined(self, layers: Sequence[Layer], keep: Sequence[int] = ()) -> list[Layer]:
        """A choice after the rounds of swaps that the quality asks for, which keep the number of each kind."""
        if not self.quality.refine:
            return list(layers)
        candidates = unprotected(self.outline, sorted({layer.kind for layer in layers}), "", keep)
        self.prepare(candidates, len(layers))
        with evaluating(self.model):
            return list(refine(layers, candidates, self.cost, self.quality.refine).layers)

    def _search(self, free: Sequence[Layer], count: int, gone: Sequence[Layer]) -> Sequence[Layer]:
        """`count` of the free layers by `iterative` or `greedy`, on top of those that are gone."""
        if self.quality.select == "iterative":
            return iterative(self.ranking(self.quality.metric), free, count, gone).layers
        self.prepare([*free, *gone], count)
        self.cost.ahead([*gone, layer] for layer in free)
        return greedy(free, Count(count), self.cost, gone, self.quality.width).layers

    def _within(self, request: Request) -> Choice:
        """A budget's layers; where they would leave no attention, the one that went last stays."""
        budget = parse_budget(request.budget or "")
        self.quality.check(budget)
        candidates = unprotected(self.outline, ("attn", "mlp"), "", request.keep)
        map_size = self.width * (self.width + 1) if "linear" in self.quality.repair else 0
        goal = meter(budget, self.outline, candidates, request.context, request.latency, map_size)
        self.prepare(candidates, len(candidates))
        self.cost.ahead([layer] for layer in candidates if goal.saves(layer) > 0)
        while True:
            found = within(goal, candidates, self.cost, self.quality.width)
            try:
                check_attention_left(self.outline, found.layers)
                return found
            except PlanError:
                candidates.remove([layer for layer in found.layers if layer.kind == "attn"][-1])

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
                if self._new(tried) == self._new(modules):
                    self.tell(f"{method}: found nothing to change here")
                    continue
                passed = True
                if dense is not None:
                    gates.append(gate(dense, method, modules, tried))
                    self.tell(str(gates[-1]))
                    passed = gates[-1].passed
                if passed:
                    modules, mapped = tried, {**mapped, **maps}
        return Repair(tensors_of(modules), mapped, tuple(gates)), modules

    def _new(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Those that bring parameters of their own."""
        own = {path: module for path, module in modules.items() if any(True for _ in module.parameters())}
        return {path: module for path, module in own.items() if module is not self.model.get_submodule(path)}

    def _try(
        self, method: str, gone: Sequence[Layer], modules: Mapping[str, nn.Module], mapped: Mapping[Layer, Any]
    ) -> tuple[dict[str, nn.Module], dict[Layer, Any]]:
        """The modules that stand in once a method has been applied, and the layers that it mapped."""
        found = {layer: slot for layer, slot in self.slots.items() if layer not in mapped}
        left = [layer for layer in self.outline.branch_layers(gone) if layer not in mapped]
        if method == "scale":
            return {**modules, **scale_modules(self.bench, left, found)}, {}
        if method == "linear":
            maps = [layer for layer in gone if layer.kind == "attn"]
            return self.standing(gone, ["linear"]), {layer: self._relative(layer, self._forms(layer)) for layer in maps}
        if method == "refit":
            return {**modules, **(self.folds(left).modules(left, mapped) if left else {})}, {}
        if method == "lora":
            first = first_changed(self.bench.stepper, modules)
            return {**modules, **heal(self.bench.stepper, modules, first, progress=self._tell_healing)}, {}
        standing = {path: module for path, module in modules.items() if any(True for _ in module.parameters())}
        slots = all_slots(self.architecture, self.outline.branch_layers(gone), found)
        return Lockstep(self.bench.stepper, self.architecture, left, self.groups, standing).refit(slots), {}

    def _tell_healing(self, step: int, steps: int) -> None:
        """A line for each tenth of the training."""
        if step * 10 // steps > (step - 1) * 10 // steps:
            self.tell(f"lora: {step} of {steps} steps")

    def _relative(self, layer: Layer, forms: Mapping[str, Any]) -> dict[str, Any]:
        prefix = self.architecture.block(layer).path + "."
        return {path.removeprefix(prefix): form for path, form in forms.items()}

    @property
    def calibration(self) -> dict[str, Any]:
        """The texts, as an artifact names them."""
        texts = [windows.ref.model_dump() for windows in self.data]
        return texts[0] if len(texts) == 1 else {"name": ",".join(text["name"] for text in texts), "texts": texts}

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


def wording(quality: Quality, request: Request) -> str:
    """What chose the layers: `similarity`, `iterative cca`, `greedy kl, refined`."""
    greedy = "greedy kl" if request.budget or quality.select == "greedy" else ""
    found = greedy or (quality.metric if quality.select == "one-shot" else f"{quality.select} {quality.metric}")
    return found + (", refined" if quality.refine else "")


def improve(
    improver: Improver, ref: ModelRef, request: Request, other: Windows | None = None
) -> tuple[Plan, Repair, Mapping[str, nn.Module]]:
    """A plan by the improver's quality settings, its repair, and the modules that stand in for the model's own.

    Raises PlanError, CalibrationError or ArchitectureError.
    """
    layers, scores = improver.choose(request)
    repair, modules = improver.repair(layers, other)
    quality = improver.quality
    fields = {"keep": list(request.keep), "metric": wording(quality, request), "calibration": improver.calibration}
    spec = request.spec or str(parse_budget(request.budget or ""))
    return make_plan(improver.outline, ref, spec, layers, scores, **fields), repair, modules
