"""Choose what goes and repair what stays: the steps behind --metric, --select, --budget and --repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from dropformer.metrics.analysis.analyze import evaluating, proven
from dropformer.metrics.blockwise.divergence import DenseReference, dropped_modules, first_changed, with_parameters
from dropformer.metrics.blockwise.layer_metrics import MetricContext, Ranking
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.repair.base import Gate, Repair, gate, tensors_of
from dropformer.metrics.repair.cache import RepairCache
from dropformer.metrics.repair.lora import heal, need_peft
from dropformer.metrics.repair.refit import all_slots
from dropformer.metrics.repair.ridge import group_of
from dropformer.metrics.repair.scale import scale_modules
from dropformer.metrics.repair.sequential import SequentialRefit
from dropformer.metrics.search.budget import meter, parse_budget, within
from dropformer.metrics.search.select import KL, Choice, Count, greedy, iterative, refine
from dropformer.metrics.search.strategy import Strategy, Target
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import Outline
from dropformer.prune.plan import Plan, check_attention_left, choose, make_plan, unprotected
from dropformer.prune.spec import parse_spec

Tell = Callable[[str], None]
BUSY_CPU, BUSY_GPU = 256, 8192  # tokens in a pass beyond which more candidates at once gain nothing


@dataclass
class Improver:
    """A model on calibration windows of one or more kinds of text, ready to choose and to repair.

    Windows run one at a time.
    """

    model: nn.Module
    data: Sequence[Windows]
    quality: Strategy = field(default_factory=Strategy)
    tell: Tell = lambda text: None

    def __post_init__(self) -> None:
        if "lora" in self.quality.repair:
            need_peft()
        self.architecture: Architecture = proven(self.model)
        self.outline: Outline = summarize(self.model, self.architecture)
        batches, scored, kinds, groups = [], [], [], []
        for kind, windows in enumerate(self.data):
            for n, (inputs, counts) in enumerate(windows.batches(1)):
                batches.append(inputs)
                scored.append(None if counts.all() else counts)
                kinds.append(kind)
                groups.append(group_of(kind, n))
        self.kinds, self.groups = kinds, groups
        self.bench = MetricContext(
            BlockRunner(self.model, self.architecture, batches), self.architecture, scored, self.quality.stride
        )
        self._dense: DenseReference | None = None
        self._costs: dict[tuple[str, ...], KL] = {}
        self._fits: dict[tuple[int, ...], RepairCache] = {}
        self._rankings: dict[str, Ranking] = {}

    def ranking(self, metric: str) -> Ranking:
        """The scores by a metric; those that run the model for each layer measure on the windows of a search."""
        if metric not in self._rankings:
            bench = self.bench
            if metric.startswith("loo-"):
                bench = replace(bench, runner=self.cost.dense.runner, scored=self.cost.dense.scored)
            self._rankings[metric] = Ranking(bench, metric)
        return self._rankings[metric]

    @property
    def cost(self) -> KL:
        """KL to the dense model on the first windows of each kind, whose streams are kept."""
        if self._dense is None:
            few = self._few(self.quality.cost_windows)
            batches = [self.bench.runner.batches[i] for i in few]
            runner = BlockRunner(self.model, self.architecture, batches)
            self._dense = DenseReference(runner, self.quality.stride, [self.bench.scored[i] for i in few])
        known = self.quality.repair if self.quality.aware else ()
        foreseen = tuple(method for method in known if method in ("linear", "refit"))
        if foreseen not in self._costs:
            stands = partial(self.fits.standing, repair=foreseen)
            stream = self.bench.runner.start(0)
            busy = BUSY_CPU if stream.device.type == "cpu" else BUSY_GPU
            together = max(1, busy // stream.shape[:2].numel())
            self._costs[foreseen] = KL(self._dense, self.architecture, stands, together=together)
        return self._costs[foreseen]

    @property
    def fitted_on(self) -> tuple[int, ...]:
        """The windows to fit on: all but those that a search measures its candidates on, where enough are left."""
        few = set(self._few(self.quality.cost_windows)) if self.quality.searches else set()
        return tuple(i for i in range(len(self.groups)) if 2 * len(few) > len(self.groups) or i not in few)

    @property
    def fits(self) -> RepairCache:
        """Maps and refits from the windows to fit on."""
        which = self.fitted_on
        if which not in self._fits:
            self._fits[which] = RepairCache(self.bench, self.outline, which, [self.groups[i] for i in which])
        return self._fits[which]

    def prepare(self, candidates: Sequence[Layer], count: int) -> None:
        """Make the refits known that a search is to see: those of any `count` of the candidates."""
        if not self.quality.aware or "refit" not in self.quality.repair:
            return
        mapped = "linear" in self.quality.repair
        self.fits.prepare([layer for layer in candidates if not (mapped and layer.kind == "attn")], count)

    def _few(self, count: int) -> list[int]:
        """So many windows, in turn from each kind of text."""
        rank = [self.kinds[:i].count(kind) for i, kind in enumerate(self.kinds)]
        return sorted(range(len(rank)), key=lambda i: (rank[i], self.kinds[i]))[:count]

    def choose(self, request: Target) -> tuple[list[Layer], dict[Layer, float]]:
        """The layers to drop, and the score or cost that each was chosen by (higher goes first)."""
        self.quality = self.quality.under(request.budget)
        with evaluating(self.model):
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

    def _within(self, request: Target) -> Choice:
        """A budget's layers; where they would leave no attention, the one that went last stays."""
        budget = parse_budget(request.budget or "")
        candidates = unprotected(self.outline, ("attn", "mlp"), "", request.keep)
        map_size = self.fits.width * (self.fits.width + 1) if "linear" in self.quality.repair else 0
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
            dense = DenseReference(BlockRunner(self.model, self.architecture, inputs), self.quality.stride)
        modules: Mapping[str, nn.Module] = dropped_modules(self.architecture, gone)
        gates: list[Gate] = []
        mapped: dict[Layer, Any] = {}
        with evaluating(self.model):
            for method in self.quality.repair:
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
        """Those that bring parameters that are not the model's."""
        own = with_parameters(modules)
        return {path: module for path, module in own.items() if module is not self.model.get_submodule(path)}

    def _try(
        self, method: str, gone: Sequence[Layer], modules: Mapping[str, nn.Module], mapped: Mapping[Layer, Any]
    ) -> tuple[dict[str, nn.Module], dict[Layer, Any]]:
        """The modules that stand in once a method has been applied, and the layers that it mapped."""
        found = {layer: slot for layer, slot in self.fits.slots.items() if layer not in mapped}
        left = [layer for layer in self.outline.branch_layers(gone) if layer not in mapped]
        if method == "scale":
            return {**modules, **scale_modules(self.bench, left, found)}, {}
        if method == "linear":
            maps = [layer for layer in gone if layer.kind == "attn"]
            forms = {layer: self._relative(layer, self.fits.forms(layer)) for layer in maps}
            return self.fits.standing(gone, ["linear"]), forms
        if method == "refit":
            return {**modules, **(self.fits.folds(left).modules(left, mapped) if left else {})}, {}
        if method == "lora":
            first = first_changed(self.bench.runner, modules)
            return {**modules, **heal(self.bench.runner, modules, first, progress=self._tell_healing)}, {}
        standing = with_parameters(modules)
        slots = all_slots(self.architecture, self.outline.branch_layers(gone), found)
        return SequentialRefit(self.bench.runner, self.architecture, left, self.groups, standing).refit(slots), {}

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


def wording(quality: Strategy) -> str:
    """What chose the layers: `similarity`, `iterative cca`, `greedy kl, refined`."""
    found = {"one-shot": quality.metric, "greedy": "greedy kl"}.get(quality.select, f"iterative {quality.metric}")
    return found + (", refined" if quality.refine else "")


def improve(
    improver: Improver, ref: ModelRef, request: Target, other: Windows | None = None
) -> tuple[Plan, Repair, Mapping[str, nn.Module]]:
    """A plan by the improver's quality settings, its repair, and the modules that stand in for the model's own.

    Raises PlanError, CalibrationError or ArchitectureError.
    """
    layers, scores = improver.choose(request)
    repair, modules = improver.repair(layers, other)
    quality = improver.quality
    fields = {"keep": list(request.keep), "metric": wording(quality), "calibration": improver.calibration}
    spec = request.spec or str(parse_budget(request.budget or ""))
    return make_plan(improver.outline, ref, spec, layers, scores, **fields), repair, modules
