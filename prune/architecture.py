"""What a Transformer is made of: stacks of blocks, each block's branches, and where to read the stream.

These are plain values. `discover` finds them by watching a forward pass; analysis reads the taps,
surgery replaces the modules named in `Branch.modules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dropformer.prune.errors import PlanError

BranchKind = Literal["attn", "mlp", "cross"]
LayerKind = Literal["attn", "mlp", "cross", "block"]
BRANCH_KINDS: tuple[BranchKind, ...] = ("attn", "mlp", "cross")
KIND_NAMES: dict[str, str] = {"attn": "attention", "mlp": "MLP", "cross": "cross-attention", "block": "block"}


def of_images(stack: str) -> bool:
    """Is a stack of this name the vision tower of a vision-language model?"""
    return bool(re.search("vision|visual|image", stack))


def owns(modules: Mapping[str, Any], name: str) -> bool:
    """Does a module or parameter (by its path in the block) leave with these modules?  A norm that a form keeps stays.

    {"rel_attn": {"norm": "layer_norm", "of": [...]}} owns rel_attn.r, and not rel_attn.layer_norm.weight.
    """
    return any(
        within(name, path) and not (norm_of(form) and within(name, f"{path}.{norm_of(form)}"))
        for path, form in modules.items()
    )


def norm_of(form: Any) -> str:
    """The child module that a form keeps (`modeling.Skipped`), "" for none."""
    return form.get("norm", "") if isinstance(form, dict) else ""


def form_members(form: Any) -> Iterator[tuple[int | str | None, Any]]:
    """(key, word) of each member of an output form: ["zeros", None] has (0, "zeros") and (1, None)."""
    if isinstance(form, dict) and "of" in form:
        form = form["of"]
    if isinstance(form, dict):
        form = form.get("list") or form.get("fields")
    if isinstance(form, list):
        yield from enumerate(form)
    elif isinstance(form, dict):
        yield from form.items()
    else:
        yield None, form


def has_zeros(form: Any) -> bool:
    """Does a form end its branch with zeros, rather than feed the branch's end?"""
    return any(str(word).startswith("zeros") for _, word in form_members(form))


def within(path: str, root: str) -> bool:
    """Is a module path `root` or below it?"""
    return path == root or path.startswith(root + ".")


@dataclass(frozen=True, order=True)
class Layer:
    """One droppable thing, in the original model's numbering.  Prints as people write it: `attn:12`."""

    kind: str  # a LayerKind
    index: int
    stack: str = ""  # "" for a model with one stack, else e.g. "encoder", "decoder"

    def __str__(self) -> str:
        return f"{self.stack}.{self.kind}:{self.index}" if self.stack else f"{self.kind}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> Layer:
        """The layer that `str` printed.  Raises PlanError for any other text."""
        name, _, index = text.partition(":")
        stack, _, kind = name.rpartition(".")
        if kind not in KIND_NAMES or not index.isdecimal():
            raise PlanError(f"`{text}` is not a layer; expected for example attn:12 or encoder.mlp:3")
        return cls(kind, int(index), stack)


@dataclass(frozen=True)
class Tap:
    """A tensor that a forward hook can read: one input or output of a module.

    `key` is the position or the keyword of an input, the index or the field of an output, None for an
    output that is the tensor itself.  `like` is a tap whose shape the tensor gets where the module itself
    sees it flattened (OPT's norms see [B * T, D]).  A tuple of keys is their concatenation over channels: the two
    streams of a reversible block.
    """

    module: str
    side: Literal["input", "output"]
    key: int | str | tuple[int | str | None, ...] | None = None
    like: Tap | None = None


@dataclass(frozen=True)
class Branch:
    """What a block adds to its residual stream: the attention layer or the MLP layer, with its norms.

    `modules` maps each module that belongs to the branch alone (path relative to the block) to what
    it returns once it is dropped, in the form that `modeling.Skipped` takes: "zeros" for the module
    whose output is added to the stream, "input" for those before it, inside a list for a tuple.
    The stream is read at `before` and `after`; where no module sees it after the branch (a parallel
    block), `delta` is the branch's own output and after = before + delta.  `scaled`: the block multiplies
    its stream by constants of its own (MiniMax, Gemma 4), which stay when the branch is dropped.
    """

    kind: BranchKind
    modules: dict[str, Any]
    before: Tap
    after: Tap | None = None
    delta: tuple[Tap, ...] = ()
    scaled: bool = False


@dataclass(frozen=True)
class Block:
    """One block of a stack: its module path, where its input and output are read, its branches.

    `kept` maps each kind of branch that cannot be dropped to the reason; such a block cannot go as a
    whole either.  `form` is the output form of the whole block once it is dropped (`skipped_modules.Skipped`).
    `inplace`: the block writes into its stream, so that a tap must be copied to be held.  `plain`: without
    its branches the block returns its input as it came, which post-norm and scaled blocks do not.
    """

    index: int
    path: str
    input: Tap
    output: Tap
    branches: tuple[Branch, ...]
    parallel: bool = False
    kept: dict[str, str] = field(default_factory=dict)
    form: Any = None
    inplace: bool = False
    plain: bool = True

    def branch(self, kind: str) -> Branch | None:
        return next((branch for branch in self.branches if branch.kind == kind), None)


@dataclass(frozen=True)
class Stack:
    """A run of blocks through which one residual stream flows.

    The first `fixed` blocks cannot get another number: the model acts on the stream between them, or reads it there.
    """

    name: str
    path: str
    blocks: tuple[Block, ...]
    fixed: int = 0

    def layers(self) -> Iterator[Layer]:
        for block in self.blocks:
            if not block.kept:
                yield Layer("block", block.index, self.name)
            for branch in block.branches:
                yield Layer(branch.kind, block.index, self.name)


@dataclass(frozen=True)
class Architecture:
    """Every stack of a model, as found and proven by `discover`."""

    stacks: tuple[Stack, ...]

    def stack(self, name: str) -> Stack:
        for stack in self.stacks:
            if stack.name == name:
                return stack
        known = ", ".join(stack.name or "(the only one)" for stack in self.stacks)
        raise PlanError(f"the model has no stack `{name}`; it has {known}")

    def layers(self) -> list[Layer]:
        return [layer for stack in self.stacks for layer in stack.layers()]

    def block(self, layer: Layer) -> Block:
        return self.stack(layer.stack).blocks[layer.index]

    def branches(self, layer: Layer) -> tuple[Branch, ...]:
        """The branches that are removed when `layer` is dropped: one, or all of a block's."""
        block = self.block(layer)
        if layer.kind == "block":
            return block.branches
        branch = block.branch(layer.kind)
        return (branch,) if branch else ()
