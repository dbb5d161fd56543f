"""From a drop spec and a ranking to the layers that are dropped, and to those that stay with less attention.

Ties go to the deeper layer (arXiv 2406.15786 finds the deep ones redundant).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dropformer.prune.architecture import KIND_NAMES, Layer
from dropformer.prune.errors import PlanError
from dropformer.prune.outline import Outline
from dropformer.prune.rungs.agent import Agents
from dropformer.prune.spec import Selector, parse_spec
from dropformer.prune.window import Window

PublishedLists = Callable[[str, int], Sequence[int]]
Pick = Callable[[Sequence[Layer], int, Sequence[Layer]], Sequence[Layer]]
"""Selects `count` of the free layers, given those that are dropped already: (free, count, dropped) -> layers."""


def choose(
    outline: Outline, spec: str, similarity: Mapping[Layer, float] | None = None, keep: Sequence[int] = ()
) -> list[Layer]:
    """The layers that a spec drops or maps by one ranking, most redundant first.  Raises as `choose_forms`."""
    return choose_forms(outline, spec, similarity, keep)[0]


def choose_forms(
    outline: Outline,
    spec: str,
    similarity: Mapping[Layer, float] | None = None,
    keep: Sequence[int] = (),
    published: PublishedLists | None = None,
    pick: Pick | None = None,
) -> tuple[list[Layer], list[Layer]]:
    """The layers that a spec drops, most redundant first, and those of them that it replaces by a linear map.

    `similarity` gives one score per layer (the highest are dropped first); `pick` selects instead of it.
    Raises PlanError when the spec asks for more than there is, for a protected or unknown layer, or lacks what
    it needs, and where no attention would be left.
    """
    selectors = sorted(parse_spec(spec), key=lambda s: s.kind != "block")  # a block is dropped with all its branches
    if staying := next((selector for selector in selectors if selector.rung), None):
        raise PlanError(f"`{staying}` keeps its layers, and only `prune` and a plan take such; leave it out here")
    chosen, maps = list[Layer](), list[Layer]()
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
        maps += picked if selector.kind == "linear" else []
    check_attention_left(outline, chosen)
    return chosen, maps


def check_possible(
    outline: Outline, spec: str, keep: Sequence[int] = (), published: PublishedLists | None = None
) -> None:
    """Raises PlanError for a spec that no scores could satisfy, before any are measured.

    Counts are checked beside the layers that other items name; what only the scores decide, such as how many
    attention layers the blocks of `block:2` take along, is left to `choose`.
    """
    selectors = parse_spec(spec)
    named = [selector for selector in selectors if selector.indices is not None or selector.published]
    drops, windows = ([str(s) for s in named if bool(s.rung) == stays] for stays in (False, True))
    removed = choose_forms(outline, ",".join(drops), None, keep, published)[0] if drops else []
    if windows:
        choose_windows(outline, ",".join(windows), removed, None, keep)
    asked: dict[tuple[str, tuple[str, ...]], int] = {}
    for selector in selectors:
        if selector in named:
            continue
        free, key = _candidates(outline, selector, keep, removed), (selector.stack, selector.kinds)
        before = 0 if selector.rung else asked.get(key, 0)
        count = before + _count(outline, selector, free[before:])
        if not selector.rung:
            asked[key] = count
            check_attention_left(outline, [*removed, *free] if count == len(free) else removed)


def choose_windows(
    outline: Outline,
    spec: str,
    dropped: Sequence[Layer] = (),
    ranking: Mapping[Layer, float] | None = None,
    keep: Sequence[int] = (),
) -> dict[Layer, Window | Agents]:
    """The attention layers that a spec gives a window or agents, least harmed first; `dropped` ones have none.

    `ranking` maps every attention layer to a score by which the highest comes first.  Raises PlanError as
    `choose` does.
    """
    found: dict[Layer, Window | Agents] = {}
    for selector in parse_spec(spec):
        if selector.rung is None:
            continue
        free = _candidates(outline, selector, keep, [*dropped, *found])
        if selector.indices is not None:
            picked = _named(outline, selector, selector.indices, free, keep)
        else:
            picked = _top(selector, free, _count(outline, selector, free), ranking)
        found |= dict.fromkeys(picked, selector.rung)
    return found


def _published(selector: Selector, published: PublishedLists | None) -> Sequence[int]:
    if published is None:
        raise PlanError(
            f"`{selector}` needs a recipe with published lists; see `prune recipes`, or write {selector.kind}:N"
        )
    return published(selector.kind, selector.count)


def _candidates(outline: Outline, selector: Selector, keep: Sequence[int], chosen: Sequence[Layer]) -> list[Layer]:
    removed = set(outline.branch_layers(chosen))
    layers = unprotected(outline, selector.kinds, selector.stack, keep)
    return [layer for layer in layers if not removed.intersection(outline.branch_layers([layer]))]


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
    does = "takes" if selector.rung else "drops"
    count = total * selector.count // 100 if selector.percent else selector.count
    what = " and ".join(KIND_NAMES[kind] for kind in selector.kinds)
    if count > len(free):
        rest = "" if len(free) == total else f", {total - len(free)} of them protected or dropped already"
        raise PlanError(f"`{selector}` {does} {count} {what} layers, but the model has {total}{rest}; ask for fewer")
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
    removed = set(outline.branch_layers(chosen))
    for stack in outline.stacks:
        attention = outline.layers("attn", stack.name)
        if attention and removed.issuperset(attention):
            raise PlanError("the plan drops every attention layer, and a model without any mixes no tokens; keep one")
        with_keys = {layer for layer in attention if outline.branch(layer).kv}
        if with_keys and removed.issuperset(with_keys):
            raise PlanError(
                f"the plan drops every layer with keys and values ({', '.join(map(str, sorted(with_keys)))}), and "
                "transformers' cache then has no way to tell how long a text is; keep one"
            )
