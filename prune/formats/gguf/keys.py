"""The metadata of a pruned GGUF file, the dense file's pairs byte for byte but for those that state its shape; and the
order of rotary rows that its architecture wants."""

import struct
from collections.abc import Sequence

from dropformer.prune.errors import CheckpointError
from dropformer.prune.formats.gguf.header import ARRAY, STRING
from dropformer.prune.formats.gguf.layout import DECI, STAND_IN_WIDTH, Dense, GgufBlock, is_stock

UINT32, INT32 = 4, 5
RECORD_KEY = "dropformer.record"

Span = tuple[int, int]
Pair = bytes | Span | list[bytes | Span]
"""A value with its type: encoded, or where the dense file has it, [start, end), or in pieces of both kinds."""


def new_pairs(dense: Dense, blocks: Sequence[GgufBlock], record: str | None = None) -> dict[str, Pair]:
    """The pruned file's pairs, in its order; `record` says how it was made, in JSON."""
    stock = is_stock(blocks)
    shape = {"block_count": uint32(len(blocks))} if stock else deci_shape(dense, blocks)
    new = DECI if not stock else dense.architecture
    pairs: dict[str, Pair] = {}
    for key, span in dense.header.pairs.items():
        prefix, _, rest = key.partition(".")
        if key == "general.architecture":
            pairs[key] = string(new)
        elif prefix == dense.architecture:
            _check_array(dense, key, rest in shape)
            pairs[f"{new}.{rest}"] = shape.pop(rest, span)
        elif prefix != "split" and key != RECORD_KEY:
            if prefix not in ("tokenizer", "general"):
                _check_array(dense, key, False)
            pairs[key] = span
    pairs |= {f"{new}.{key}": value for key, value in shape.items()}
    return {**pairs, RECORD_KEY: string(record)} if record else pairs


def _check_array(dense: Dense, key: str, written: bool) -> None:
    """Raises CheckpointError for an array that may have an entry for each block, or name some, and is not written anew.

    Tokens and rotary sections are none.
    """
    apart = written or key not in dense.header.arrays or key.endswith("dimension_sections")
    if not apart and (dense.header.metadata[key] == dense.blocks or key.startswith(f"{dense.architecture}.")):
        raise CheckpointError(
            f"{dense.name}: its key {key} has an entry for each block or names some, and dropformer does not know how "
            "it follows a drop; choose another format"
        )


def deci_shape(dense: Dense, blocks: Sequence[GgufBlock]) -> dict[str, Pair]:
    """What deci asks: heads, heads with keys and MLP widths of every block, and the head's width, once.

    No heads: no attention.  Heads without keys: a linear map.
    """
    heads = [dense.heads if b.attention or b.mapped else 0 for b in blocks]
    kv_heads = [dense.kv_heads if b.attention else 0 for b in blocks]
    if not heads[0]:
        heads[0] = kv_heads[0] = 1  # of zeros: llama.cpp computes the head's width only where block 0 has heads
    head_width = uint32(dense.head_width)
    return {
        "block_count": uint32(len(blocks)),
        "feed_forward_length": int32s([STAND_IN_WIDTH if b.mlp is None else dense.mlp_width for b in blocks]),
        "attention.head_count": int32s(heads),
        "attention.head_count_kv": int32s(kv_heads),
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "rope.dimension_count": head_width,
    }


def uint32(value: int) -> bytes:
    return struct.pack("<II", UINT32, value)


def int32s(values: Sequence[int]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}i", ARRAY, INT32, len(values), *values)


def string(value: str) -> bytes:
    return struct.pack("<I", STRING) + bare_string(value)


def bare_string(value: str) -> bytes:
    """A string as names and keys are written: its length, then UTF-8."""
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def interleaved(data: bytes | memoryview, heads: int, head_width: int) -> bytes:
    """Rows 0, D/2, 1, D/2 + 1, ... of each head, on bytes, so that quantized rows pass as they are.

    transformers and qwen2's graph rotate value j of a head with value j + D/2; the graphs of llama and deci rotate
    2j with 2j + 1.  Rows of queries and keys in that order give the same attention.  data: heads * D rows of equal
    size; of D = 4, rows a b c d become a c b d.
    """
    row, half = len(data) // (heads * head_width), head_width // 2
    order = [j + part for j in range(half) for part in (0, half)]
    firsts = (head * head_width for head in range(heads))
    return b"".join(bytes(data[(first + j) * row : (first + j + 1) * row]) for first in firsts for j in order)
