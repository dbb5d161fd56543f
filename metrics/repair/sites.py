"""Places in the stream of a model that lost layers: what still writes there, and where the next branch reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dropformer.prune.architecture import Architecture, Branch, Layer, Stack


@dataclass(frozen=True)
class StreamSite:
    """A place in the stream: after this branch of this block, or after a parallel block as a whole.

    `alive`: something still writes there.
    """

    block: int
    branch: Branch
    layer: Layer
    whole: bool
    alive: bool

    @property
    def key(self) -> str | None:
        """What names the place among its block's: the branch's kind, None for the block's end."""
        return None if self.whole else self.branch.kind


def sites(
    architecture: Architecture, stack: Stack, gone: Sequence[Layer], wanted: Collection[Layer]
) -> list[StreamSite]:
    """Every site in order of depth, without the `gone` layers and with something at the `wanted` ones."""
    dead = {(g.index, b.kind) for g in gone for b in architecture.branches(g)} - {(w.index, w.kind) for w in wanted}
    found = []
    for i, block in enumerate(stack.blocks):
        layers = [Layer(b.kind, block.index, stack.name) for b in block.branches]
        lives = [(layer.index, layer.kind) not in dead for layer in layers]
        if block.parallel:  # its branches read one stream: one site, for the last slot
            last = max((n for n, layer in enumerate(layers) if layer in wanted), default=0)
            found.append(StreamSite(i, block.branches[last], layers[last], True, any(lives)))
            continue
        parts = zip(block.branches, layers, lives, strict=True)
        found += [StreamSite(i, branch, layer, False, alive) for branch, layer, alive in parts]
    return found


def target(found: Sequence[StreamSite], n: int) -> StreamSite:
    """The last site before the next one that something writes to: where the next kept branch reads."""
    end = next((k for k in range(n + 1, len(found)) if found[k].alive), len(found))
    return found[end - 1]
