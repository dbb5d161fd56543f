"""The plan artifact: which layers are dropped, become linear maps or see a window, why, and what that saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import Artifact, FrozenRecord, ModelRef
from dropformer.prune.outline import Outline
from dropformer.prune.rungs.agent import Agents
from dropformer.prune.window import Window


class Drop(FrozenRecord):
    """One dropped layer with the similarity that chose it (None where a list named it)."""

    layer: str
    similarity: float | None = None


class Savings(FrozenRecord):
    """What a plan takes away: parameters, and elements of the KV cache for each further token, before and after.

    `kv_windows`: elements that layers with a window hold, whatever the length, once it is beyond their window.
    """

    parameters: int
    parameters_after: int
    kv: int
    kv_after: int
    kv_windows: int = 0


class DraftRef(FrozenRecord):
    """What a plan gives as the draft of its dense model: `tokens` drafted at a time, and what that is expected to give.

    `acceptance`: mean of sum over the vocabulary of min(p, q) at `temperature` (greedy agreement at 0), on the
    calibration text; `cost`: a draft step over a dense step at this context and batch; `speedup`: expected tokens
    per second over those of the dense model alone.
    """

    tokens: int
    acceptance: float
    cost: float
    speedup: float
    temperature: float
    context: int
    batch: int


class Plan(Artifact):
    """Which layers are dropped, why, and what that saves.  Indices are those of the original model.

    `repairs`: the gates that repairs passed; `not_repaired`: what they could not mend, and why.
    `packing_cost`: the mean similarity given up so that what is left packs into a stock model.  `windows`: attention
    layers that stay and see a window, such as {"attn:3": "1024+4"}, most redundant first; `agents`: those of an
    encoder that attend through so many averaged queries.  `maps`: dropped layers with a linear map in their place,
    whose weights a plan does not hold.  `draft`: for a plan chosen to draft for its dense model.
    """

    kind = "plan"
    model: ModelRef
    spec: str
    keep: list[int] = []
    metric: str | None = None
    calibration: dict[str, Any] | None = None
    repairs: list[str] = []
    not_repaired: list[str] = []
    packing_cost: float | None = None
    windows: dict[str, str] = {}
    agents: dict[str, int] = {}
    maps: list[str] = []
    draft: DraftRef | None = None
    drops: list[Drop]
    outline: Outline
    savings: Savings

    @property
    def layers(self) -> list[Layer]:
        """The dropped layers, most redundant first within each item of the spec."""
        return [Layer.parse(drop.layer) for drop in self.drops]

    @property
    def windowed(self) -> dict[Layer, Window]:
        """The attention layers that see a window only."""
        return {Layer.parse(layer): Window.parse(text) for layer, text in self.windows.items()}

    @property
    def mapped(self) -> list[Layer]:
        """The dropped layers with a linear map in their place."""
        return [Layer.parse(layer) for layer in self.maps]

    @property
    def folded(self) -> dict[Layer, Window]:
        """The windows that have constants in place of sinks."""
        return {layer: window for layer, window in self.windowed.items() if window.fold}

    @property
    def fitted(self) -> bool:
        """Does the plan need numbers that are fitted on text?"""
        return bool(self.maps or self.folded)

    @property
    def rungs(self) -> dict[Layer, Window | Agents]:
        """The attention layers that stay and attend to less."""
        return {**self.windowed, **{Layer.parse(layer): Agents(count) for layer, count in self.agents.items()}}

    def kv_share(self, context: int) -> float:
        """The KV cache of a sequence of `context` tokens, over the dense model's."""
        if not self.savings.kv:
            return 1.0
        windows = sum(self.outline.branch(layer).kv * window.held(context) for layer, window in self.windowed.items())
        kept = self.outline.kv_at(context, [*self.layers, *self.windowed])
        return (kept + windows) / self.outline.kv_at(context)

    def dropped(self) -> dict[str, Any]:
        """{attention: [..], mlp: [..], blocks: [..]} in original indices; one such entry a stack where several."""
        stacks = {stack.name: _by_kind(self.layers, stack.name) for stack in self.outline.stacks}
        return stacks[""] if list(stacks) == [""] else {name or "main": kinds for name, kinds in stacks.items()}

    def lost_repairs(self, path: Any) -> str:
        """The warning for a plan with repairs that is read from a file and followed unrepaired."""
        return f"{path} was made with repairs, which a plan does not hold; add --repair to repeat them"

    def unrepaired(self) -> Plan:
        """The same drops without the repairs, whose weights a plan does not hold."""
        removed = self.outline.dropped_parameters(self.layers)
        savings = self.savings.model_copy(update={"parameters_after": self.savings.parameters - removed})
        return self.model_copy(update={"repairs": [], "not_repaired": [], "savings": savings})


def _by_kind(layers: Sequence[Layer], stack: str) -> dict[str, list[int]]:
    names = {"attn": "attention", "mlp": "mlp", "cross": "cross_attention", "block": "blocks"}
    found = {
        name: sorted(l.index for l in layers if l.kind == kind and l.stack == stack) for kind, name in names.items()
    }
    return {name: indices for name, indices in found.items() if indices or name != "cross_attention"}


def make_plan(
    outline: Outline,
    model: ModelRef,
    spec: str,
    layers: Sequence[Layer],
    similarity: Mapping[Layer, float] | None = None,
    rungs: Mapping[Layer, Window | Agents] | None = None,
    **fields: Any,
) -> Plan:
    """The plan artifact for the chosen layers; `fields` are the artifact's other ones (keep, calibration, maps, ...).

    Parameters are those without linear maps, which count once they are fitted.
    """
    rungs = rungs or {}
    windows = {layer: rung for layer, rung in rungs.items() if isinstance(rung, Window)}
    savings = Savings(
        parameters=outline.parameters,
        parameters_after=outline.parameters - outline.dropped_parameters(layers),
        kv=outline.kv_per_token(),
        kv_after=outline.kv_per_token([*layers, *windows]),
        kv_windows=sum(outline.branch(layer).kv * window.held(2**62) for layer, window in windows.items()),
    )
    drops = [Drop(layer=str(layer), similarity=(similarity or {}).get(layer)) for layer in layers]
    fields["windows"] = {str(layer): str(window) for layer, window in windows.items()}
    fields["agents"] = {str(layer): rung.count for layer, rung in rungs.items() if isinstance(rung, Agents)}
    return Plan(model=model, spec=spec, drops=drops, outline=outline, savings=savings, **fields)
