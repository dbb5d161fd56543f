"""From a dense GGUF file and an arrangement to the blocks and tensors of the pruned file: pure arithmetic.

    gguf_blocks(arrangement)               -> [GgufBlock, ...]    the new file's blocks
    lay_out(dense, blocks, repaired)       -> [GgufPiece, ...]    what each new tensor is made of

llama.cpp's `llama` and `qwen2` give every block an attention and an MLP.  Its `deci` (llama.cpp,
src/models/deci.cpp) is the llama graph with head counts and MLP widths for each block, so it can carry what
lacks a part, with three exceptions for which zeros stand in: block 0 must have a head, every block must have
an MLP, and a linear map in place of attention has no bias.  Such a map becomes a block of its own, whose MLP
is zeros with the map's bias as that of its last matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import BlockMap
from dropformer.prune.errors import CheckpointError, shown
from dropformer.prune.formats.gguf.header import GgufHeader, GgufTensor, byte_size

DECI = "deci"
STAND_IN_WIDTH = 256
"""Of an MLP of zeros: the longest block of any quantized type, so that every type can hold its rows."""

TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
OUTSIDE = {  # tensors of no block that the architecture, and deci, know
    "llama": ("token_embd.weight", "output_norm.weight", "output.weight", *TABLES),
    "qwen2": ("token_embd.weight", "output_norm.weight", "output.weight"),
}
ROTATED = ("attn_q.weight", "attn_q.bias", "attn_k.weight", "attn_k.bias")


@dataclass(frozen=True)
class Dense:
    """What a dense file's keys say: H heads of D values, KV of them with keys; name: the file's, for messages."""

    header: GgufHeader
    name: str
    architecture: str
    blocks: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_width: int

    def leaves(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that a block may have, fastest dimension first; the weights it must have."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        matrices = {
            "attn_q": (self.width, queries),
            "attn_k": (self.width, keys),
            "attn_v": (self.width, keys),
            "attn_output": (queries, self.width),
            "ffn_gate": (self.width, self.mlp_width),
            "ffn_up": (self.width, self.mlp_width),
            "ffn_down": (self.mlp_width, self.width),
        }
        found: dict[str, tuple[int, ...]] = {"attn_norm.weight": (self.width,), "ffn_norm.weight": (self.width,)}
        for name, (inner, outer) in matrices.items():
            found |= {f"{name}.weight": (inner, outer), f"{name}.bias": (outer,)}
        return found

    def tensor(self, block: int, leaf: str) -> GgufTensor | None:
        return self.header.tensors.get(f"blk.{block}.{leaf}")


def read_dense(header: GgufHeader, name: str) -> Dense:
    """The dimensions of a dense llama or qwen2.  Raises CheckpointError for what surgery cannot be done on."""
    architecture = header.text("general.architecture") or ""

    def number(key: str, default: int | None = None) -> int:
        value = header.metadata.get(f"{architecture}.{key}", default)
        if f"{architecture}.{key}" in arrays:
            raise CheckpointError(
                f"{name}: its key {architecture}.{key} has a number for each block, and only blocks that are alike can "
                "be pruned in GGUF; prune the model's Hugging Face folder, then convert it"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"{name}: its key {architecture}.{key} is {shown(value)}, not a positive number")
        return value

    arrays = header.arrays
    heads, width = number("attention.head_count"), number("embedding_length")
    dense = Dense(
        header,
        name,
        architecture,
        number("block_count"),
        width,
        number("feed_forward_length"),
        heads,
        number("attention.head_count_kv", heads),
        number("attention.key_length", width // heads or None),
    )
    lengths = {number(key, dense.head_width) for key in ("attention.value_length", "rope.dimension_count")}
    if lengths != {dense.head_width} or dense.head_width % 2:
        raise CheckpointError(
            f"{name}: keys, values and rotary embedding of unequal or odd lengths are not for {DECI}; "
            "choose another format"
        )
    _check_tensors(dense)
    return dense


def _check_tensors(dense: Dense) -> None:
    """Raises CheckpointError unless the file holds the tensors of a dense model, of the shapes its keys say."""
    header, known = dense.header, dense.leaves()
    expected = {f"blk.{i}.{leaf}": shape for i in range(dense.blocks) for leaf, shape in known.items()}
    for name, tensor in header.tensors.items():
        if name not in expected and name not in OUTSIDE[dense.architecture]:
            raise CheckpointError(
                f"{dense.name} holds {shown(name)}, for which {DECI} and dense {dense.architecture} have no place; "
                "choose another format"
            )
        if expected.get(name, tensor.shape) != tensor.shape:
            raise CheckpointError(
                f"{dense.name}: {name} has the shape {tensor.shape}, but its keys say {expected[name]}; get it again"
            )
    missing = [name for name in expected if name.endswith(".weight") and name not in header.tensors]
    if missing:
        raise CheckpointError(f"{dense.name} lacks {missing[0]}; get it again")


@dataclass(frozen=True)
class GgufBlock:
    """One block of the new file.

    place: its number in the pruned model in memory; source: the original block of its attention; mlp: that of
    its MLP, None if it has none; mapped: a linear map is in place of the attention.
    """

    place: int
    source: int
    attention: bool
    mlp: int | None
    mapped: bool = False


def gguf_blocks(block_map: BlockMap) -> list[GgufBlock]:
    """The blocks of the new file: those of the one stack that kept anything, linear maps apart."""
    ((stack, arranged),) = block_map.stacks.items()
    found = []
    for place, block in enumerate(arranged):
        attention, mlp = "attn" not in block.skipped, None if "mlp" in block.skipped else block.mlp
        if Layer("attn", block.source, stack) in block_map.mapped:
            found.append(GgufBlock(place, block.source, False, None, mapped=True))
            attention = False
        if attention or mlp is not None:
            found.append(GgufBlock(place, block.source, attention, mlp))
    return found


def is_stock(blocks: Sequence[GgufBlock]) -> bool:
    """True when no block lacks a part, so that the file is one of the dense architecture."""
    return all(block.attention and block.mlp is not None for block in blocks)


@dataclass(frozen=True)
class NewValues:
    """A tensor whose bytes are not the source's, in the order of rows that the new file has."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True)
class GgufPiece:
    """One tensor of the new file: the bytes of `source`, or `data`, or zeros.

    heads: the source's rows are to be interleaved within each of so many heads; replaced: the source's tensor
    whose place new values take.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    source: GgufTensor | None = None
    data: memoryview | None = None
    heads: int = 0
    replaced: GgufTensor | None = None

    @property
    def nbytes(self) -> int:
        return byte_size(self.kind, self.shape)


def lay_out(dense: Dense, blocks: Sequence[GgufBlock], repaired: Mapping[str, NewValues]) -> list[GgufPiece]:
    """The tensors of the new file, in its order.  repaired: new values by the new file's names."""
    pieces = [_piece(dense, name, name, repaired) for name in dense.header.tensors if not name.startswith("blk.")]
    for index, block in enumerate(blocks):
        pieces += _block_pieces(dense, index, block, repaired, deci=not is_stock(blocks))
    return pieces


def _block_pieces(
    dense: Dense, index: int, block: GgufBlock, repaired: Mapping[str, NewValues], deci: bool
) -> list[GgufPiece]:
    pieces = []
    for leaf in dense.leaves():
        own = block.source if leaf.startswith("attn_") else block.mlp
        if leaf.startswith("attn_") and not block.attention and not (block.mapped and leaf == "attn_norm.weight"):
            continue
        if own is not None and dense.tensor(own, leaf):
            piece = _piece(dense, f"blk.{own}.{leaf}", f"blk.{index}.{leaf}", repaired)
            rotate = deci and dense.architecture == "qwen2" and leaf in ROTATED and piece.source is not None
            heads = dense.heads if "attn_q" in leaf else dense.kv_heads
            pieces.append(replace(piece, heads=heads) if rotate else piece)
    if block.mapped:
        pieces += [_new(f"blk.{index}.{leaf}", repaired) for leaf in ("attn_output.weight", "ffn_down.bias")]
    elif index == 0 and not block.attention:
        pieces += _zeros(replace(dense, heads=1, kv_heads=1), index, block.source, "attn_")
    if block.mlp is None:
        pieces += _zeros(replace(dense, mlp_width=STAND_IN_WIDTH), index, block.source, "ffn_")
    return pieces


def _piece(dense: Dense, old: str, new: str, repaired: Mapping[str, NewValues]) -> GgufPiece:
    source = dense.header.tensors[old]
    if new in repaired:
        return replace(_new(new, repaired), replaced=source)
    return GgufPiece(new, source.kind, source.shape, source)


def _new(name: str, repaired: Mapping[str, NewValues]) -> GgufPiece:
    values = repaired[name]
    return GgufPiece(name, values.kind, values.shape, data=values.data)


def _zeros(small: Dense, index: int, like: int, part: str) -> list[GgufPiece]:
    """A branch of zeros of the dimensions of `small`, its matrices of the types that block `like` has."""
    pieces = []
    for leaf, shape in small.leaves().items():
        if leaf.startswith(part) and leaf.endswith(".weight"):
            kind = small.header.tensors[f"blk.{like}.{leaf}"].kind
            if shape[0] % GGML_QUANT_SIZES[kind][0]:
                kind = GGMLQuantizationType.F16
            pieces.append(GgufPiece(f"blk.{index}.{leaf}", kind, shape))
    return pieces
