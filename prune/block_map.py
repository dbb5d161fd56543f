"""From dropped layers to the blocks that remain, packed into whole ones where they pair up.

The surviving branches of a stack are a sequence A M A M ...  Where it can be paired again as (A, M), the
model is a plain shorter one that loads anywhere.  Where it cannot, blocks that lost everything go and
the others stay with a part skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dropformer.prune.architecture import Layer, owns
from dropformer.prune.outline import Outline, StackOutline
from dropformer.prune.rungs.agent import Agents
from dropformer.prune.window import Window


@dataclass(frozen=True)
class MappedBlock:
    """One block of the pruned stack, by the original blocks that its parts come from.

    `mlp` differs from `source` only where a block's attention is paired with a later block's MLP;
    `skipped` are the kinds of branch that it lacks; `empty`: nothing of the block is left but its place.
    """

    source: int
    mlp: int
    skipped: tuple[str, ...] = ()
    empty: bool = False


@dataclass(frozen=True)
class BlockMap:
    """The pruned stacks, by name, in order.

    `mapped` are attention layers with a linear map in their place: modules of the block and their forms.
    `rungs` are those that stay and attend to less: to a window of tokens, or through agents.
    """

    stacks: dict[str, tuple[MappedBlock, ...]]
    mapped: Mapping[Layer, Mapping[str, Any]] = field(default_factory=dict)
    rungs: Mapping[Layer, Window | Agents] = field(default_factory=dict)

    @property
    def windows(self) -> dict[Layer, Window]:
        """The layers that see a window: the last tokens and the first ones."""
        return {layer: rung for layer, rung in self.rungs.items() if isinstance(rung, Window)}

    @property
    def packed(self) -> bool:
        """True when no block lacks a part or attends to less: the model is a stock, shorter one."""
        if self.mapped or self.rungs:
            return False
        return not any(block.skipped for blocks in self.stacks.values() for block in blocks)

    def in_place(self, outline: Outline) -> bool:
        """True when every block is where it was, so that no number and no count changes."""
        moved = any(b.source != i or b.mlp != i for blocks in self.stacks.values() for i, b in enumerate(blocks))
        return not moved and all(len(self.stacks[stack.name]) == stack.blocks for stack in outline.stacks)


@dataclass(frozen=True)
class Surgery:
    """What was done to a model: the outline it had, the layers that went, the blocks that remain.

    `note` says why blocks that lost everything stayed as empty ones, where that is so.  `tensors`: parameters
    of the pruned model, by its names, that are no longer the dense model's (repairs).
    """

    outline: Outline
    layers: tuple[Layer, ...]
    block_map: BlockMap
    note: str = ""
    tensors: Mapping[str, Any] = field(default_factory=dict)


def map_blocks(
    outline: Outline,
    dropped: Iterable[Layer],
    shorten: bool = True,
    mapped: Mapping[Layer, Mapping[str, Any]] | None = None,
    rungs: Mapping[Layer, Window | Agents] | None = None,
) -> BlockMap:
    """The blocks that remain without these layers.

    Blocks that must keep their numbers (`StackOutline.fixed`) stay, skipped or not; with `shorten=False` all do.
    """
    dropped = set(dropped)
    removed = set(outline.branch_layers(dropped)) - set(mapped or {})
    stacks = {}
    for stack in outline.stacks:
        kept = [_block(stack, i, removed, Layer("block", i, stack.name) in dropped) for i in range(stack.blocks)]
        fixed = stack.fixed if shorten else stack.blocks
        rest = kept[fixed:]
        stacks[stack.name] = (*kept[:fixed], *(_paired(stack, rest) or (b for b in rest if not b.empty)))
    return BlockMap(stacks, mapped or {}, rungs or {})


def _block(stack: StackOutline, index: int, removed: set[Layer], whole: bool) -> MappedBlock:
    """A block less its dropped branches.  A plain one is empty without them, any other if dropped as a whole."""
    branches, rest = stack.of_block(index), stack.block(index)
    skipped = tuple(b.kind for b in branches if Layer(b.kind, index, stack.name) in removed)
    bare = bool(branches) and len(skipped) == len(branches) and not rest.kept
    return MappedBlock(index, index, skipped, bare and (whole or rest.plain))


def _paired(stack: StackOutline, blocks: list[MappedBlock]) -> tuple[MappedBlock, ...] | None:
    """The survivors as (attention, MLP) pairs, or None where they do not alternate or blocks differ."""
    if stack.parallel or sorted(b.kind for b in stack.branches) != ["attn", "mlp"]:
        return None
    if any(rest.kept or not rest.plain for rest in stack.rest):
        return None
    survivors = [(kind, b.source) for b in blocks for kind in ("attn", "mlp") if kind not in b.skipped]
    if [kind for kind, _ in survivors] != ["attn", "mlp"] * (len(survivors) // 2):
        return None
    attention, mlps = survivors[::2], survivors[1::2]
    return tuple(MappedBlock(a, m) for (_, a), (_, m) in zip(attention, mlps, strict=True))


def skipped_modules(outline: Outline, block_map: BlockMap) -> dict[str, Any]:
    """Module path in the new numbering -> what `Skipped` returns there."""
    modules = {}
    for stack in outline.stacks:
        for new, block in enumerate(block_map.stacks[stack.name]):
            if block.empty and (form := stack.block(block.source).form) is not None:
                modules[f"{stack.path}.{new}"] = form
                continue
            for kind in block.skipped:
                for name, form in stack.modules(kind, block.source).items():
                    modules[f"{stack.path}.{new}.{name}"] = form
    for layer, forms in block_map.mapped.items():
        path = f"{outline.stack(layer.stack).path}.{new_index(block_map, layer)}"
        modules |= {f"{path}.{name}": form for name, form in forms.items()}
    for layer, rung in block_map.rungs.items():
        path = f"{outline.stack(layer.stack).path}.{new_index(block_map, layer)}"
        modules[f"{path}.{attention_module(outline, layer)}"] = _form(rung)
    return modules


def _form(rung: Window | Agents) -> dict[str, Any]:
    """What config.json says of a layer that stays and attends to less."""
    if isinstance(rung, Agents):
        return {"agents": rung.count}
    return {"window": [rung.width, rung.sinks], **({"fold": True} if rung.fold else {})}


def attention_module(outline: Outline, layer: Layer) -> str:
    """The module of an attention layer that attends, by its path in the block: not one of the norms around it.

    Its output form has a part of zeros, or it is what a norm behind it takes as it came: the one with parts.
    """
    modules = outline.branch(layer).modules
    several = [name for name, form in modules.items() if isinstance(form, list)]
    zeros = [name for name, form in modules.items() if str(form).startswith("zeros")]
    return (several or zeros or list(modules))[0]


def attention_path(outline: Outline, layer: Layer) -> str:
    """The path in the dense model of the module that computes a layer's attention."""
    return f"{outline.stack(layer.stack).path}.{layer.index}.{attention_module(outline, layer)}"


def new_index(block_map: BlockMap, layer: Layer) -> int:
    """The pruned block that holds what is left of a layer's block."""
    blocks = block_map.stacks[layer.stack]
    return next(
        new for new, block in enumerate(blocks) if layer.index == (block.mlp if layer.kind == "mlp" else block.source)
    )


def whole(outline: Outline) -> BlockMap:
    """Every block where it was, with all that it had."""
    return BlockMap({s.name: tuple(MappedBlock(i, i) for i in range(s.blocks)) for s in outline.stacks})


def original_blocks(block_map: BlockMap) -> dict[str, Any]:
    """Map from new to original block: an index, or {attention, mlp} where the two come from different ones."""

    def original(block: MappedBlock) -> Any:
        return block.source if block.source == block.mlp else {"attention": block.source, "mlp": block.mlp}

    maps = {
        name: {str(new): original(block) for new, block in enumerate(blocks)}
        for name, blocks in block_map.stacks.items()
    }
    return maps[""] if list(maps) == [""] else maps


def new_name(outline: Outline, block_map: BlockMap, name: str) -> str | None:
    """A parameter's name in the pruned model, or None where it is dropped.  Names are the modules', not the files'."""
    for stack in outline.stacks:
        prefix = stack.path + "."
        if not name.startswith(prefix):
            continue
        index_text, _, rest = name.removeprefix(prefix).partition(".")
        if not index_text.isdecimal() or int(index_text) >= stack.blocks:
            return name
        index = int(index_text)
        kind = next((b.kind for b in stack.of_block(index) if owns(b.modules, rest)), None)
        for new, block in enumerate(block_map.stacks[stack.name]):
            if (block.mlp if kind == "mlp" else block.source) == index:
                if block.empty and stack.block(index).form is not None:
                    return None
                forms = block_map.mapped.get(Layer(kind, index, stack.name), {}) if kind else {}
                return None if kind in block.skipped or owns(forms, rest) else f"{prefix}{new}.{rest}"
        return None
    return name
