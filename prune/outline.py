"""A model's anatomy as data: what an artifact needs to plan and to cut without opening the model again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dropformer.prune.architecture import KIND_NAMES, Layer
from dropformer.prune.artifact import FrozenRecord
from dropformer.prune.errors import PlanError


class BranchOutline(FrozenRecord):
    """Branches of one kind that are alike: in which blocks, which modules they own, what each weighs.

    `modules` are paths relative to the block with the form each takes once dropped (`modeling.Skipped`);
    `parameters` are those owned by one branch; `kv` counts the cache elements one token costs in it, and
    `window` how many tokens its cache holds at most (None: all).
    """

    kind: str
    blocks: list[int]
    modules: dict[str, Any]
    parameters: int
    kv: int = 0
    window: int | None = None

    def held(self, context: int) -> int:
        """Tokens in its cache after `context` of them."""
        return context if self.window is None else min(context, self.window)


class BlockOutline(FrozenRecord):
    """Blocks that are alike in what is more than their branches.

    `plain`: without its branches the block returns its input as it came; one that does not (a post-norm
    block) is not the identity without its branches.  `form` is the output form of the dropped block, None where
    those of its branches serve.  `parameters` are those of no branch.  `kept` maps each kind of branch that cannot be
    dropped to the reason; such a block stays.
    """

    blocks: list[int]
    plain: bool = True
    form: Any = None
    parameters: int = 0
    kept: dict[str, str] = {}


class StackOutline(FrozenRecord):
    """One stack: its module path, how many blocks, whether a block's branches read the same stream.

    `rest` tells what blocks are beyond their branches; a block that it does not name is plain and keeps nothing.
    `caches`: how many entries of the cache a block has, block i those from i * caches on.  `alike`: any block could
    stand in any other's place.  `fixed`: how many leading blocks must keep their numbers, because the model acts on
    the stream between them by position (image features that Qwen3-VL adds after its first blocks).
    """

    name: str = ""
    path: str
    blocks: int
    parallel: bool = False
    caches: int = 1
    alike: bool = False
    fixed: int = 0
    branches: list[BranchOutline]
    rest: list[BlockOutline] = []

    def branch(self, kind: str, index: int) -> BranchOutline | None:
        return next((b for b in self.branches if b.kind == kind and index in b.blocks), None)

    def modules(self, kind: str, index: int) -> dict[str, Any]:
        """The modules of a block's branch of a kind, with the output form of each; none where it has no such branch."""
        branch = self.branch(kind, index)
        return branch.modules if branch else {}

    def block(self, index: int) -> BlockOutline:
        return next((b for b in self.rest if index in b.blocks), BlockOutline(blocks=[index]))

    def of_block(self, index: int) -> list[BranchOutline]:
        return [b for b in self.branches if index in b.blocks]


class Outline(FrozenRecord):
    """Every stack of a model.  `autos`: which of transformers' Auto classes load it, with one head or another."""

    stacks: list[StackOutline]
    parameters: int
    autos: list[str] = []

    def stack(self, name: str) -> StackOutline:
        for stack in self.stacks:
            if stack.name == name:
                return stack
        known = ", ".join(f"`{stack.name}`" for stack in self.stacks)
        if len(self.stacks) == 1 and not self.stacks[0].name:
            raise PlanError(f"the model has one stack, and none named `{name}`; leave the name out, as in attn:3")
        said = f"the model has no stack named `{name}`" if name else "the model has several stacks"
        raise PlanError(f"{said}; write one of {known} before the kind, as in encoder.attn:3")

    def layers(self, kind: str, stack: str = "") -> list[Layer]:
        """Every layer of a kind in a stack, in order of depth."""
        part = self.stack(stack)
        if kind == "block":
            return [Layer("block", i, stack) for i in range(part.blocks) if not part.block(i).kept]
        return [Layer(kind, i, stack) for i in range(part.blocks) if part.branch(kind, i)]

    def branch_layers(self, layers: Iterable[Layer]) -> list[Layer]:
        """The layers with every block replaced by its branches, sorted, each once."""
        return sorted(set(self._branch_layers(layers)))

    def _branch_layers(self, layers: Iterable[Layer]) -> Iterator[Layer]:
        for layer in layers:
            if layer.kind != "block":
                yield layer
                continue
            for branch in self.stack(layer.stack).of_block(layer.index):
                yield Layer(branch.kind, layer.index, layer.stack)

    def branch(self, layer: Layer) -> BranchOutline:
        branch = self.stack(layer.stack).branch(layer.kind, layer.index)
        if branch is None:
            raise PlanError(f"the model has no {KIND_NAMES[layer.kind]} layer {layer.index} ({layer})")
        return branch

    def dropped_parameters(self, layers: Iterable[Layer]) -> int:
        """Parameters of the dropped branches, and all other parameters of each dropped block."""
        layers = list(layers)
        rest = sum(self.stack(stack).block(index).parameters for stack, index in self.dropped_blocks(layers))
        return rest + sum(self.branch(layer).parameters for layer in self.branch_layers(layers))

    def dropped_blocks(self, layers: Iterable[Layer]) -> set[tuple[str, int]]:
        """(stack, index) of each block that is dropped as such, or that is the identity without its branches."""
        layers = list(layers)
        removed = self.branch_layers(layers)
        blocks = {(layer.stack, layer.index) for layer in layers if layer.kind == "block"}
        return blocks | {(l.stack, l.index) for l in removed if self._empty(l.stack, l.index, removed)}

    def _empty(self, stack: str, index: int, removed: Sequence[Layer]) -> bool:
        """Is a block the identity without these branches?"""
        part = self.stack(stack)
        rest, lost = part.block(index), {l.kind for l in removed if (l.stack, l.index) == (stack, index)}
        return rest.plain and not rest.kept and lost == {branch.kind for branch in part.of_block(index)}

    def kv_per_token(self, dropped: Iterable[Layer] = ()) -> int:
        """Cache elements that one token costs, over all stacks, without the dropped layers."""
        return self.kv_at(1, dropped)

    def kv_at(self, context: int, dropped: Iterable[Layer] = ()) -> int:
        """Cache elements of a sequence of `context` tokens; a layer with a sliding window holds no more than that."""
        total = sum(b.kv * b.held(context) * len(b.blocks) for stack in self.stacks for b in stack.branches)
        lost = [self.branch(layer) for layer in self.branch_layers(dropped)]
        return total - sum(branch.kv * branch.held(context) for branch in lost)
