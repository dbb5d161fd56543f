"""A plan that packs, in any architecture: the blocks that remain get new numbers, and nothing else changes.

llama.cpp gives some architectures facts by block number or depth that no key of the file says (read in its
src/models, b9190 and 2026-10): Gemma 2, Gemma 3 and gpt-oss attend to windows in all but every second, sixth, second
block, and Gemma's 27B divide queries by another root because they are 46 or 62 deep.  A plan under which these would
differ is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from dropformer.prune.errors import CheckpointError, shown
from dropformer.prune.formats.gguf.keys import RECORD_KEY, Pair, string, uint32
from dropformer.prune.formats.gguf.layout import GgufBlock, GgufPiece
from dropformer.prune.formats.gguf.source import GgufSource

PARTS = {"attn": ("attn_", "post_attention_norm."), "mlp": ("ffn_", "post_ffw_norm.", "exp_probs_b.")}
BY_BLOCK = {
    "attn": ("attention.head_count", "attention.head_count_kv", "attention.sliding_window_pattern"),
    "mlp": ("feed_forward_length", "expert_feed_forward_length"),
}
"""Keys that may be a list with an entry for each block, by the branch that it is about."""
PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2}
"""Every so-manieth block attends to everything, the others to a window."""
SCALED_DEPTHS = {"gemma2": 46, "gemma3": 62}


def renumbered(source: GgufSource, blocks: Sequence[GgufBlock]) -> list[GgufPiece]:
    """The tensors of the new file.  Raises CheckpointError where numbers or depth change what llama.cpp computes."""
    for number, leaves in enumerate(source.leaves):
        if missing := source.leaves[0].keys() ^ leaves.keys():
            raise CheckpointError(f"{source.name}: block 0 or {number} lacks {min(missing)}; get it again")
    _check_numbers(source, blocks)
    _check_depth(source, len(blocks))
    outside = {name: tensor for name, tensor in source.header.tensors.items() if not name.startswith("blk.")}
    pieces = [GgufPiece(name, tensor.kind, tensor.shape, tensor) for name, tensor in outside.items()]
    for number, block in enumerate(blocks):
        for leaf, tensor in _leaves(source, block).items():
            pieces.append(GgufPiece(f"blk.{number}.{leaf}", tensor.kind, tensor.shape, tensor))
    return pieces


def _leaves(source: GgufSource, block: GgufBlock) -> dict:
    """The tensors of a new block: a whole old one's, or one's attention and another's MLP."""
    if block.mlp == block.source or block.mlp is None:
        return source.leaves[block.source]
    return {
        leaf: tensor
        for kind, index in (("attn", block.source), ("mlp", block.mlp))
        for leaf, tensor in source.leaves[index].items()
        if _kind(source, leaf) == kind
    }


def _kind(source: GgufSource, leaf: str) -> str:
    """The branch that a tensor of a block belongs to."""
    for kind, starts in PARTS.items():
        if leaf.startswith(starts):
            return kind
    raise CheckpointError(f"{source.name}: {shown(leaf)} may be of either branch; drop whole blocks, or add --dense")


def _check_numbers(source: GgufSource, blocks: Sequence[GgufBlock]) -> None:
    period = PERIODS.get(source.architecture)
    if source.architecture == "gemma3" and not source.key("attention.sliding_window"):
        period = None
    if period and any((b.source % period == period - 1) != (i % period == period - 1) for i, b in enumerate(blocks)):
        raise CheckpointError(
            f"{source.name}: llama.cpp tells the windows of {source.architecture} by block number, and this plan moves "
            f"them; drop blocks by {period}, or add --dense"
        )


def _check_depth(source: GgufSource, blocks: int) -> None:
    """Does llama.cpp divide queries by the root of another number once the model is `blocks` deep?"""
    special = SCALED_DEPTHS.get(source.architecture)
    if not special or (source.blocks == special) == (blocks == special):
        return
    even = source.key("embedding_length") // source.key("attention.head_count")
    deep = source.key("attention.key_length") or even
    if deep != even:
        raise CheckpointError(
            f"{source.name}: llama.cpp scales the attention of {source.architecture} by its depth ({special} blocks: "
            f"1/sqrt({even}), else 1/sqrt({deep})), which this plan changes; add --dense"
        )


def stock_pairs(source: GgufSource, blocks: Sequence[GgufBlock] | None, record: str | None) -> dict[str, Pair]:
    """The keys of the new file: the dense file's, with the number of blocks and lists by block as they are now.

    blocks: None where all stay.
    """
    pairs: dict[str, Pair] = {}
    for key, span in source.header.pairs.items():
        prefix, _, rest = key.partition(".")
        if prefix == "split" or key == RECORD_KEY:
            continue
        pairs[key] = span
        if blocks is None or prefix in ("tokenizer", "general") or rest.endswith("dimension_sections"):
            continue
        if key == f"{source.architecture}.block_count":
            pairs[key] = uint32(len(blocks))
        elif key in source.header.arrays:
            length = source.header.metadata[key]
            if prefix == source.architecture or length == source.blocks:
                pairs[key] = _sliced(source, key, blocks)
    return {**pairs, RECORD_KEY: string(record)} if record else pairs


def _sliced(source: GgufSource, key: str, blocks: Sequence[GgufBlock]) -> Pair:
    """A list with an entry for each block, of those that remain: its head, and where the old file has each entry.

    Raises CheckpointError for a list that is not known to be one.
    """
    span, rest = source.header.pairs[key], key.removeprefix(f"{source.architecture}.")
    numbers = []
    if rest in BY_BLOCK["attn"]:
        numbers = [block.source for block in blocks]
    elif rest in BY_BLOCK["mlp"]:
        numbers = [block.source if block.mlp is None else block.mlp for block in blocks]
    size, left = divmod(span[1] - span[0] - 16, source.blocks)
    if not numbers or left or source.header.metadata[key] != source.blocks:
        raise CheckpointError(
            f"{source.name}: its key {key} has an entry for each block or names some, and dropformer does not know how "
            "it follows a drop; choose another format"
        )
    at = span[0] + 16
    return [
        (span[0], span[0] + 8),
        struct.pack("<Q", len(numbers)),
        *[(at + i * size, at + (i + 1) * size) for i in numbers],
    ]
