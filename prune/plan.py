"""From a drop spec and a ranking to the layers that are dropped, and to those that keep a window of attention.

Ties go to the deeper layer (arXiv 2406.15786 finds the deep ones redundant).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dropformer.prune.architecture import KIND_NAMES, Layer
from dropformer.prune.artifact import Artifact, FrozenRecord, ModelRef
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import Outline
from dropformer.prune.spec import Selector, parse_spec
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
    """Which layers go, why, and what that saves.  Indices are those of the original model.

    `repairs`: the gates that repairs passed; `not_repaired`: what they could not mend, and why.
    `packing_cost`: the mean similarity given up so that what is left packs into a stock model.  `windows`: attention
    layers that stay and see a window, such as {"attn:3": "1024+4"}, most redundant first.  `draft`: for a plan that was
    chosen to draft for its dense model.
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

    def kv_share(self, context: int) -> float:
        """The KV cache of a sequence of `context` tokens, over the dense model's."""
        if not self.savings.kv:
            return 1.0
        windows = sum(self.outline.branch(layer).kv * window.held(context) for layer, window in self.windowed.items())
        return (self.savings.kv_after * context + windows) / (self.savings.kv * context)

    def dropped(self) -> dict[str, Any]:
        """{attention: [..], mlp: [..], blocks: [..]} in original indices; one such entry a stack where several."""
        stacks = {stack.name: _by_kind(self.layers, stack.name) for stack in self.outline.stacks}
        return stacks[""] if list(stacks) == [""] else {name or "main": kinds for name, kinds in stacks.items()}

    def lost_repairs(self, path: Any) -> str:
        """The warning for a plan read from a file that is followed as it stands."""
        return f"{path} was made with repairs, which a plan does not hold; add --repair to repeat them"

    def unrepaired(self) -> Plan:
        """The same drops without the repairs, whose weights a plan does not hold."""
        gone = self.outline.dropped_parameters(self.layers)
        savings = self.savings.model_copy(update={"parameters_after": self.savings.parameters - gone})
        return self.model_copy(update={"repairs": [], "not_repaired": [], "savings": savings})


def _by_kind(layers: Sequence[Layer], stack: str) -> dict[str, list[int]]:
    names = {"attn": "attention", "mlp": "mlp", "cross": "cross_attention", "block": "blocks"}
    found = {
        name: sorted(l.index for l in layers if l.kind == kind and l.stack == stack) for kind, name in names.items()
    }
    return {name: indices for name, indices in found.items() if indices or name != "cross_attention"}


PublishedLists = Callable[[str, int], Sequence[int]]
Pick = Callable[[Sequence[Layer], int, Sequence[Layer]], Sequence[Layer]]
"""So many of the layers that may go, on top of those that are gone: (free, count, gone) -> layers."""


def choose(
    outline: Outline,
    spec: str,
    similarity: Mapping[Layer, float] | None = None,
    keep: Sequence[int] = (),
    published: PublishedLists | None = None,
    pick: Pick | None = None,
) -> list[Layer]:
    """The layers that a spec drops, most redundant first.

    `similarity` maps every layer to the score that ranks it (highest goes first); `pick` chooses in its place.
    Raises PlanError when the spec asks for more than there is, for a protected or unknown layer, or lacks what
    it needs, and where no attention would be left.
    """
    selectors = sorted(parse_spec(spec), key=lambda s: s.kind != "block")  # a block is dropped with all its branches
    if windowed := next((selector for selector in selectors if selector.window), None):
        raise PlanError(f"`{windowed}` keeps its layers, and only `prune` and a plan take windows; leave it out here")
    chosen: list[Layer] = []
    for selector in selectors:
        free = _candidates(outline, selector, keep, chosen)
        if selector.indices is not None:
            picked = _named(outline, selector, selector.indices, free, keep)
        elif selector.published:
            picked = _named(outline, selector, _published(selector, published), free, keep)
        else:
            count = _count(outline, selector, free)
            picked = list(pick(free, count, chosen)) if pick else _top(selector, free, count, similarity)
        chosen += picked
    check_attention_left(outline, chosen)
    return chosen


def choose_windows(
    outline: Outline,
    spec: str,
    dropped: Sequence[Layer] = (),
    ranking: Mapping[Layer, float] | None = None,
    keep: Sequence[int] = (),
) -> dict[Layer, Window]:
    """The attention layers that a spec gives a window, least harmed first; `dropped` ones have none.

    `ranking` maps every attention layer to a score by which the highest is windowed first.  Raises PlanError as
    `choose` does.
    """
    found: dict[Layer, Window] = {}
    for selector in parse_spec(spec):
        if selector.window is None:
            continue
        free = _candidates(outline, selector, keep, [*dropped, *found])
        if selector.indices is not None:
            picked = _named(outline, selector, selector.indices, free, keep)
        else:
            picked = _top(selector, free, _count(outline, selector, free), ranking)
        found |= dict.fromkeys(picked, selector.window)
    return found


def _published(selector: Selector, published: PublishedLists | None) -> Sequence[int]:
    if published is None:
        raise PlanError(
            f"`{selector}` needs a recipe with published lists; see `prune recipes`, or write {selector.kind}:N"
        )
    return published(selector.kind, selector.count)


def _candidates(outline: Outline, selector: Selector, keep: Sequence[int], chosen: Sequence[Layer]) -> list[Layer]:
    gone = set(outline.branch_layers(chosen))
    layers = unprotected(outline, selector.kinds, selector.stack, keep)
    return [layer for layer in layers if not gone.intersection(outline.branch_layers([layer]))]


def unprotected(outline: Outline, kinds: Sequence[str], stack: str, keep: Sequence[int]) -> list[Layer]:
    """The layers of some kinds outside of the blocks in `keep`.  Raises PlanError for blocks that are not there."""
    blocks = outline.stack(stack).blocks
    for index in keep:
        if not -blocks <= index < blocks:
            raise PlanError(f"--keep names block {index}, but the blocks are 0 to {blocks - 1}")
    kept = {index % blocks for index in keep}
    return [layer for kind in kinds for layer in outline.layers(kind, stack) if layer.index not in kept]


def _named(
    outline: Outline, selector: Selector, indices: Sequence[int], free: Sequence[Layer], keep: Sequence[int]
) -> list[Layer]:
    kind = selector.kinds[0]
    layers = outline.layers(kind, selector.stack)
    blocks = outline.stack(selector.stack).blocks
    known = {layer.index: layer for layer in layers}
    picked = []
    for index in indices:
        layer = known.get(index + blocks if index < 0 else index)
        if layer is None:
            if why := _why_kept(outline, selector, index + blocks if index < 0 else index):
                raise PlanError(f"`{selector}` names {KIND_NAMES[selector.kind]} layer {index}, which must stay: {why}")
            raise PlanError(
                f"`{selector}` names {KIND_NAMES[kind]} layer {index}, but the model has "
                f"{len(layers)} of them in blocks 0 to {blocks - 1}"
            )
        if layer not in free:
            raise PlanError(f"`{selector}` names {layer}, which is protected by --keep or dropped by another item")
        if layer in picked:
            raise PlanError(f"`{selector}` names {layer} twice")
        picked.append(layer)
    return picked


def _why_kept(outline: Outline, selector: Selector, index: int) -> str | None:
    """Why a layer that a block has cannot be dropped; None where the block has no such layer."""
    kept = outline.stack(selector.stack).block(index).kept
    if selector.kind == "block":
        return next((f"{KIND_NAMES.get(kind, kind)}: {reason}" for kind, reason in kept.items()), None)
    return kept.get(selector.kind) or kept.get("block")


def _count(outline: Outline, selector: Selector, free: Sequence[Layer]) -> int:
    """How many layers a selector drops of those that are free."""
    total = sum(len(outline.layers(kind, selector.stack)) for kind in selector.kinds)
    count = total * selector.count // 100 if selector.percent else selector.count
    what = " and ".join(KIND_NAMES[kind] for kind in selector.kinds)
    if count > len(free):
        rest = "" if len(free) == total else f", {total - len(free)} of them protected or dropped already"
        raise PlanError(f"`{selector}` drops {count} {what} layers, but the model has {total}{rest}; ask for fewer")
    if count == 0:
        raise PlanError(f"`{selector}` rounds down to no layer: the model has {total} {what} layers; ask for more")
    return count


def _top(
    selector: Selector, free: Sequence[Layer], count: int, similarity: Mapping[Layer, float] | None
) -> list[Layer]:
    if similarity is None:
        raise PlanError(
            f"`{selector}` needs scores; run `prune analyze` first, or name the layers as {selector.kind}=20,21"
        )
    missing = [layer for layer in free if not similarity.get(layer, float("nan")) <= float("inf")]
    if missing:
        raise PlanError(f"the scores hold no number for {missing[0]}; analyze the model again")
    return sorted(free, key=lambda layer: (-similarity[layer], -layer.index, layer.kind))[:count]


def check_attention_left(outline: Outline, chosen: Sequence[Layer]) -> None:
    """Raises PlanError where no attention, or none with keys and values, is left."""
    gone = set(outline.branch_layers(chosen))
    for stack in outline.stacks:
        attention = outline.layers("attn", stack.name)
        if attention and gone.issuperset(attention):
            raise PlanError("the plan drops every attention layer, and a model without any mixes no tokens; keep one")
        with_keys = {layer for layer in attention if outline.branch(layer).kv}
        if with_keys and gone.issuperset(with_keys):
            raise PlanError(
                f"the plan drops every layer with keys and values ({', '.join(map(str, sorted(with_keys)))}), and "
                "transformers' cache then has no way to tell how long a text is; keep one"
            )


def make_plan(
    outline: Outline,
    model: ModelRef,
    spec: str,
    layers: Sequence[Layer],
    similarity: Mapping[Layer, float] | None = None,
    windows: Mapping[Layer, Window] | None = None,
    **fields: Any,
) -> Plan:
    """The plan artifact for the chosen layers; `fields` are the artifact's other ones (keep, calibration, ...)."""
    windows = windows or {}
    savings = Savings(
        parameters=outline.parameters,
        parameters_after=outline.parameters - outline.dropped_parameters(layers),
        kv=outline.kv_per_token(),
        kv_after=outline.kv_per_token([*layers, *windows]),
        kv_windows=sum(outline.branch(layer).kv * window.held(2**62) for layer, window in windows.items()),
    )
    drops = [Drop(layer=str(layer), similarity=(similarity or {}).get(layer)) for layer in layers]
    named = {str(layer): str(window) for layer, window in windows.items()}
    return Plan(model=model, spec=spec, drops=drops, outline=outline, savings=savings, windows=named, **fields)
