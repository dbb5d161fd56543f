"""Parameters, FLOPs and bytes of a forward pass per block, for the dense model and without dropped layers.

Formulas (batch B, T tokens in context, layer width d = heads x head size, multiply-add = 2 FLOPs):
linear layers 2 x active parameters per token; attention 4 x T x d per query token (scores and weighted
sum, arXiv 2001.08361, table 1), so 2 x T x (T + 1) x d for a causal prefill of T tokens; a decode step reads
every weight once and the keys and values of every kept token once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from dropformer.prune.architecture import Layer
from dropformer.prune.outline import Outline
from dropformer.prune.window import Window


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: number of experts, experts used per token, parameters of each."""

    count: int
    used: int
    parameters: int

    def read(self, tokens: int) -> float:
        """Expected number of distinct experts that `tokens` tokens use, under uniform random routing."""
        return self.count * (1 - (1 - self.used / self.count) ** tokens)


@dataclass(frozen=True)
class BlockCost:
    """One block: parameters of its branches (norms included) and the shape of its attention.

    attention, mlp, shared: parameters; `shared` is in neither branch.  width: heads x head size.
    kv: key and value elements per token.  window: tokens that the layer attends to, None for all.  agents: those that
    an encoder's layer attends through, None without.
    groups: query heads per key head.
    """

    attention: int
    mlp: int
    shared: int = 0
    width: int = 0
    kv: int = 0
    heads: int = 0
    groups: int = 1
    window: int | None = None
    experts: Experts | None = None
    agents: int | None = None

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        idle = (self.experts.count - self.experts.used) * self.experts.parameters if self.experts else 0
        return self.attention + self.mlp + self.shared - idle

    def read(self, tokens: int) -> float:
        """Parameters read for `tokens` tokens in one pass."""
        if self.experts is None:
            return self.active
        used = self.experts.read(tokens) - self.experts.used
        return self.active + used * self.experts.parameters

    def seen(self, context: int) -> int:
        return context if self.window is None else min(context, self.window)

    def mapped(self, parameters: int) -> BlockCost:
        """The block with a linear map of so many parameters in place of its attention."""
        return BlockCost(parameters, self.mlp, self.shared, experts=self.experts)

    def without(self, kind: str, parameters: int) -> BlockCost:
        """The block after dropping its branch of a kind, with that branch's number of parameters."""
        if kind == "attn":
            return BlockCost(0, self.mlp, self.shared, experts=self.experts)
        if kind == "mlp":
            return replace(self, mlp=0, experts=None)
        return replace(self, shared=self.shared - parameters)


@dataclass(frozen=True)
class ModelCost:
    """A decoder's cost, or an encoder's: its blocks, the output head, and the rest.

    lookup: parameters of embedding tables, of which only single rows are read; a tied table is in `head` only.
    other: parameters outside the blocks that are always read (the last norm).
    outline: parameters per branch; hidden: width of the residual stream, 0 where unknown.  `blocks` are all blocks of
    its main stack.  tokens: those of an encoder's own input (an image of the size that it was made for, or its longest
    text); 0 for a decoder.
    """

    blocks: tuple[BlockCost, ...]
    head: int
    lookup: int
    other: int
    outline: Outline = field(compare=False)
    tokens: int = 0
    hidden: int = 0

    @property
    def parameters(self) -> int:
        return self.head + self.lookup + self.other + sum(b.attention + b.mlp + b.shared for b in self.blocks)

    @property
    def active(self) -> int:
        """Parameters that one token uses (all of them in a dense model)."""
        return self.head + self.lookup + self.other + sum(block.active for block in self.blocks)

    @property
    def kv_per_token(self) -> int:
        """Key and value elements that one token adds to the cache."""
        return sum(block.kv for block in self.blocks)

    def kv(self, context: int) -> int:
        """Key and value elements cached for one sequence of `context` tokens, with windows."""
        return sum(block.kv * block.seen(context) for block in self.blocks)

    def read(self, tokens: int) -> float:
        """Parameters read to compute `tokens` tokens in one pass."""
        return self.head + self.other + sum(block.read(tokens) for block in self.blocks)

    def prefill_flops(self, batch: int, tokens: int) -> float:
        """FLOPs of a causal prefill, logits for the last position only."""
        linear = 2 * tokens * sum(block.active for block in self.blocks) + 2 * self.head
        return batch * (linear + sum(4 * block.width * _pairs(tokens, block.window) for block in self.blocks))

    def decode_flops(self, batch: int, context: int) -> float:
        """FLOPs of one decode step whose new token attends to `context` tokens."""
        linear = 2 * (sum(block.active for block in self.blocks) + self.head)
        return batch * (linear + sum(4 * block.width * block.seen(context) for block in self.blocks))

    def decode_elements(self, batch: int, context: int) -> float:
        """Elements that one decode step must read: all weights and the KV cache once."""
        return self.read(batch) + batch * self.kv(context)

    def windowed(self, windows: Mapping[Layer, Window]) -> ModelCost:
        """The cost with windows on attention layers of the main stack, by their index in `blocks`."""
        blocks = list(self.blocks)
        for layer, window in windows.items():
            seen = blocks[layer.index].seen(window.width + window.sinks)
            blocks[layer.index] = replace(blocks[layer.index], window=seen)
        return replace(self, blocks=tuple(blocks))

    def map_parameters(self, layer: Layer) -> int:
        """Parameters of a linear map with bias, its norm's left out; of the layer itself where the width is unknown."""
        return self.hidden * (self.hidden + 1) or self.outline.branch(layer).parameters

    def without(self, layers: Iterable[Layer], maps: Collection[Layer] = ()) -> ModelCost:
        """The cost after dropping layers of the main stack, `maps` among them replaced by linear maps.

        By their indices in the original model.  As in the checkpoint, a block without branches loses its other
        parameters too.  Raises PlanError for a layer that the model does not have.
        """
        layers, costs = [layer for layer in layers if layer not in maps], dict(enumerate(self.blocks))
        for layer in maps:
            costs[layer.index] = costs[layer.index].mapped(self.map_parameters(layer))
        for layer in self.outline.branch_layers(layers):
            parameters = self.outline.branch(layer).parameters
            costs[layer.index] = costs[layer.index].without(layer.kind, parameters)
        for _, index in self.outline.dropped_blocks(layers):
            del costs[index]
        return replace(self, blocks=tuple(costs.values()))


def _pairs(tokens: int, window: int | None) -> int:
    """Query-key pairs of a causal pass over `tokens` tokens with at most `window` keys per query.

    tokens 5, window 2: the queries have 1, 2, 2, 2 and 2 keys, 9 pairs.
    """
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window
