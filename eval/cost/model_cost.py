"""What a forward pass has to do: parameters, FLOPs and bytes, block by block, with or without drops.

Formulas (batch B, T tokens in context, layer width d = heads x head size, multiply-add = 2 FLOPs):
linear layers 2 x active parameters per token; attention 4 x T x d per query token (scores and weighted
sum, arXiv 2001.08361, table 1), so 2 x T x (T + 1) x d for a causal prefill of T tokens; a decode step reads
every weight once and the keys and values of every kept token once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dropformer.eval.cost.memory import layer_kv_bytes_per_token, parameter_count
from dropformer.prune.errors import ArchitectureError, PlanError

Drops = Mapping[str, Collection[int] | int]  # {"attn": {20, 21}, "mlp": 4, "block": {30}}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many there are, how many a token uses, parameters of each."""

    count: int
    used: int
    parameters: int

    def read(self, tokens: int) -> float:
        """Expected number of different experts that `tokens` tokens use, if each picks evenly at random."""
        return self.count * (1 - (1 - self.used / self.count) ** tokens)


@dataclass(frozen=True)
class BlockWork:
    """One block: parameters of its branches (norms included) and the shape of its attention.

    attention, mlp, shared: parameters; `shared` belongs to neither branch.  width: heads x head size.
    kv: key and value elements per token.  window: tokens that the layer can see, None for all.
    groups: query heads for each key head.
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

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        idle = (self.experts.count - self.experts.used) * self.experts.parameters if self.experts else 0
        return self.attention + self.mlp + self.shared - idle

    def read(self, tokens: int) -> float:
        """Parameters read for `tokens` tokens computed together."""
        if self.experts is None:
            return self.active
        used = self.experts.read(tokens) - self.experts.used
        return self.active + used * self.experts.parameters

    def seen(self, context: int) -> int:
        return context if self.window is None else min(context, self.window)

    def without_attention(self) -> BlockWork:
        return BlockWork(0, self.mlp, self.shared, experts=self.experts)

    def without_mlp(self) -> BlockWork:
        return replace(self, mlp=0, experts=None)


@dataclass(frozen=True)
class ModelCost:
    """A decoder's work: its blocks, the head that every computed logit multiplies by, and the rest.

    lookup: parameters of tables of which only single rows are read; a tied table is in `head` alone.
    other: parameters outside the blocks that are always read (the last norm).
    """

    blocks: tuple[BlockWork, ...]
    head: int
    lookup: int
    other: int

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
        """Key and value elements held for one sequence of `context` tokens (windows considered)."""
        return sum(block.kv * block.seen(context) for block in self.blocks)

    def read(self, tokens: int) -> float:
        """Parameters read to compute `tokens` tokens together."""
        return self.head + self.other + sum(block.read(tokens) for block in self.blocks)

    def prefill_flops(self, batch: int, tokens: int) -> float:
        """FLOPs of a causal prefill, logits for the last position only."""
        linear = 2 * tokens * sum(block.active for block in self.blocks) + 2 * self.head
        return batch * (linear + sum(4 * block.width * _pairs(tokens, block.window) for block in self.blocks))

    def decode_flops(self, batch: int, context: int) -> float:
        """FLOPs of one decode step of which the new token sees `context` tokens."""
        linear = 2 * (sum(block.active for block in self.blocks) + self.head)
        return batch * (linear + sum(4 * block.width * block.seen(context) for block in self.blocks))

    def decode_elements(self, batch: int, context: int) -> float:
        """Elements that one decode step must read: weights once, every kept key and value once."""
        return self.read(batch) + batch * self.kv(context)

    def drop(self, drops: Drops) -> ModelCost:
        """The work after dropping layers.  Raises PlanError for an unknown kind or index.

        An index refers to these blocks.  A bare count takes the deepest blocks but the last, which is
        where published drop lists lie; where blocks are equal, as in most models, the choice is free.
        """
        blocks: list[BlockWork | None] = list(self.blocks)
        for kind, chosen in drops.items():
            if kind not in ("attn", "mlp", "block"):
                raise PlanError(f"cannot estimate dropping `{kind}`; expected attn, mlp or block")
            for index in _indices(kind, chosen, len(blocks)):
                blocks[index] = _dropped(kind, blocks[index])
        return replace(self, blocks=tuple(block for block in blocks if block is not None))


def work_of(model: nn.Module) -> ModelCost:
    """Read a decoder's work from its modules (real or of the meta device) and from its own KV cache.

    Raises ArchitectureError if the model has no blocks, EvaluationError if it cannot be run on token ids.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    counts = branch_parameters(model)
    kv = _kv_elements(model, len(counts))
    blocks = tuple(_block(config, index, *pair) for index, pair in enumerate(zip(counts, kv, strict=True)))
    blocks = tuple(
        replace(block, experts=experts) for block, experts in zip(blocks, _experts(model, config), strict=True)
    )
    inside = sum(sum(count.values()) for count in counts)
    head, lookup = _head_and_lookup(model)
    return ModelCost(blocks, head, lookup, parameter_count(model) - inside - head - lookup)


def branch_parameters(model: nn.Module) -> list[dict[str, int]]:
    """Parameters of each block by branch: [{"attn": n, "mlp": n, "shared": n}, ...], norms with their branch.

    Told from the names that decoders give their modules; a norm that both branches of a parallel
    block read, and whatever has no known name (a Mamba mixer), is "shared".
    """
    return [_branches(block) for block in decoder_blocks(model)]


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks: the module list that holds most parameters.  Raises ArchitectureError if none."""
    lists: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ArchitectureError(
            f"{type(model).__name__} has no list of blocks; expected a decoder, an nn.ModuleList of blocks"
        )
    return list(max(lists, key=parameter_count).children())


_MLP_NAMES = ("mlp", "feed_forward", "ffn", "moe", "fc1", "fc2", "expert", "gate", "intermediate", "output")
_MLP_NORMS = ("ln_2", "ln_mlp", "final_layer_norm", "feedforward", "ffn_norm", "mlp_norm", "norm2")


def _branches(block: nn.Module) -> dict[str, int]:
    counts: Counter[str] = Counter({"attn": 0, "mlp": 0, "shared": 0})
    names = [name for name, _ in block.named_children()]
    for name, child in block.named_children():
        counts[_owner(name, _is_norm(child), names)] += parameter_count(child)
    counts["shared"] += sum(parameter.numel() for parameter in block.parameters(recurse=False))
    return dict(counts)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and all(p.dim() < 2 for p in module.parameters())


def _owner(name: str, norm: bool, siblings: Collection[str]) -> str:
    """The branch a block's child belongs to."""
    if not norm:
        if "attn" in name or "attention" in name.lower() or name.endswith("_att"):
            return "attn"
        return "mlp" if any(part in name for part in _MLP_NAMES) else "shared"
    if any(part in name for part in _MLP_NORMS):
        return "mlp"
    sandwich = any("feedforward" in sibling for sibling in siblings)
    if name == "post_attention_layernorm" and not sandwich:
        return "mlp"
    lone = sum("norm" in sibling.lower() or sibling.startswith("ln_") for sibling in siblings) == 1
    return "shared" if lone else "attn"


def _block(config: Any, index: int, counts: Mapping[str, int], kv: int) -> BlockWork:
    attention = counts["attn"]
    if not attention:
        return BlockWork(0, counts["mlp"], counts["shared"])
    whole, config = config, _layer_config(config, index)
    heads = getattr(config, "num_attention_heads", 0)
    if not heads:
        return BlockWork(attention, counts["mlp"], counts["shared"], kv=kv)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_size = getattr(config, "qk_head_dim", None) or size
    value_size = getattr(config, "v_head_dim", None) or size
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    width = heads * (key_size + value_size) // 2
    window = _window(whole, index)
    return BlockWork(attention, counts["mlp"], counts["shared"], width, kv, heads, groups, window)


def _layer_config(config: Any, index: int) -> Any:
    """The config of one layer, where layers differ (Gemma 4)."""
    layers = getattr(config, "per_layer_config", None)
    return layers[index] if layers is not None and index < len(layers) else config


def _window(config: Any, index: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None)
    if index < len(kinds) and "sliding" in kinds[index]:
        return getattr(config, "sliding_window", None)
    if index < len(kinds) and "chunked" in kinds[index]:
        return getattr(config, "attention_chunk_size", None)
    return None


def _kv_elements(model: nn.Module, blocks: int) -> list[int]:
    """Key and value elements per token of each block, from the cache the model fills."""
    size = next(model.parameters()).element_size()
    counts = [nbytes // size for nbytes in layer_kv_bytes_per_token(model)]
    return (counts + [0] * blocks)[:blocks]


def _experts(model: nn.Module, config: Any) -> Iterator[Experts | None]:
    used = next((getattr(config, name) for name in _USED if getattr(config, name, None)), None)
    for block in decoder_blocks(model):
        experts = next((module for name, module in block.named_modules() if name.endswith("experts")), None)
        total = parameter_count(experts) if experts is not None else 0
        yield (Experts(_expert_count(experts), int(used), total // _expert_count(experts)) if total and used else None)


_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def _expert_count(experts: Any) -> int:
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    return int(next(experts.parameters()).shape[0])


def _head_and_lookup(model: nn.Module) -> tuple[int, int]:
    """Parameters of the output head, and of embedding tables that are only looked up."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    multiplied = {id(parameter): parameter.numel() for parameter in head.parameters()} if head is not None else {}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    looked_up = {id(table.weight): table.weight.numel() for table in tables if id(table.weight) not in multiplied}
    return sum(multiplied.values()), sum(looked_up.values())


def _pairs(tokens: int, window: int | None) -> int:
    """Query-key pairs of a causal pass over `tokens` tokens, each seeing at most `window` keys."""
    if window is None or window >= tokens:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def _indices(kind: str, chosen: Collection[int] | int, blocks: int) -> list[int]:
    if isinstance(chosen, int):
        if not 0 <= chosen <= blocks:
            raise PlanError(f"cannot drop {chosen} {kind} layers of {blocks}; ask for at most {blocks}")
        return [blocks - 1 if n == blocks - 1 else blocks - 2 - n for n in range(chosen)]
    for index in chosen:
        if not 0 <= index < blocks:
            raise PlanError(f"there is no {kind}:{index}; the model's blocks are 0 to {blocks - 1}")
    return sorted(set(chosen))


def _dropped(kind: str, block: BlockWork | None) -> BlockWork | None:
    if block is None or kind == "block":
        return None
    return block.without_attention() if kind == "attn" else block.without_mlp()
