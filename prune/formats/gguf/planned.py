"""What a pruned GGUF file holds, decided before a byte is written: its architecture, its keys, its tensors.

Three forms.  `llama` and `qwen2` lose any layer, as `deci` where what remains does not pair up (layout.py); any other
architecture loses what leaves a stock, shorter file (stock.py); with zeros in place of layers, every one of them loses
everything (zeros.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dropformer.prune.block_map import Surgery
from dropformer.prune.errors import CheckpointError, PlanError, shown
from dropformer.prune.formats.gguf.header import GgufHeader
from dropformer.prune.formats.gguf.keys import Pair, new_pairs
from dropformer.prune.formats.gguf.layout import (
    DECI,
    OUTSIDE,
    Dense,
    GgufBlock,
    GgufPiece,
    gguf_blocks,
    is_stock,
    lay_out,
    read_dense,
)
from dropformer.prune.formats.gguf.source import GgufSource, read_source
from dropformer.prune.formats.gguf.stock import renumbered, stock_pairs
from dropformer.prune.formats.gguf.zeros import check_zeros, silenced
from dropformer.prune.outline import Outline


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written: `stand_ins` says, a line each, what llama.cpp needs in a dropped layer's place."""

    architecture: str
    pairs: Mapping[str, Pair]
    pieces: Sequence[GgufPiece]
    stand_ins: tuple[str, ...] = ()


def planned(header: GgufHeader, name: str, surgery: Surgery, zeros: bool, record: str | None = None) -> PlannedFile:
    """The pruned form of the dense file called `name`.

    zeros: dropped layers stay, as zeros; record: JSON for the key `dropformer.record`.
    Raises CheckpointError for a file of a kind that has no such form, PlanError where it is not the model that was cut.
    """
    source = read_source(header, name)
    path = _stack_path(source, surgery.outline)
    if zeros:
        check_zeros(surgery)
        return PlannedFile(source.architecture, stock_pairs(source, None, record), silenced(source, surgery))
    blocks = gguf_blocks(surgery.block_map)
    if source.architecture in OUTSIDE and not source.experts:
        return _as_deci(read_dense(header, name), blocks, surgery, path, record)
    if not is_stock(blocks):
        raise unpaired(source)
    if surgery.tensors:
        raise no_repairs(source)
    return PlannedFile(source.architecture, stock_pairs(source, blocks, record), renumbered(source, blocks))


def unpaired(source: GgufSource) -> CheckpointError:
    return CheckpointError(
        f"{source.name}: llama.cpp gives every block of {shown(source.architecture)} an attention and an MLP, and this "
        "plan leaves blocks without one; add --dense (zeros in their place: loads, saves nothing), or drop whole "
        "blocks or pairs (block:N, joint:N with --packable)"
    )


def no_repairs(source: GgufSource) -> CheckpointError:
    return CheckpointError(f"{source.name}: repairs are written for {' and '.join(OUTSIDE)} alone; leave out --repair")


def _as_deci(dense: Dense, blocks: Sequence[GgufBlock], surgery: Surgery, path: str, record: str | None) -> PlannedFile:
    """A llama or qwen2, or a `deci` where blocks lack parts."""
    pieces = lay_out(dense, blocks, _repaired(surgery, dense, blocks, path))
    architecture = dense.architecture if is_stock(blocks) else DECI
    return PlannedFile(architecture, new_pairs(dense, blocks, record), pieces, _stand_ins(blocks))


def _stack_path(source: GgufSource, outline: Outline) -> str:
    """The path of the one stack of a model.  Raises PlanError unless it is as deep as the file."""
    depths = [stack.blocks for stack in outline.stacks]
    if depths != [source.blocks]:
        raise PlanError(
            f"the plan is for stacks of {depths} blocks, but {source.name} has one of {source.blocks}; "
            "give the file that the plan was made for"
        )
    return outline.stacks[0].path


def _repaired(surgery: Surgery, dense: Dense, blocks: Sequence[GgufBlock], path: str) -> dict:
    if not surgery.tensors:
        return {}
    from dropformer.prune.formats.gguf.repaired import new_values  # imports torch: only where there is a tensor

    return new_values(surgery.tensors, dense, blocks, path)


def _stand_ins(blocks: Sequence[GgufBlock]) -> tuple[str, ...]:
    """One line for a person on each kind of zeros in the file."""
    lines = []
    if not (blocks[0].attention or blocks[0].mapped):
        lines.append("one attention head of zeros in block 0, which llama.cpp cannot load without any")
    if bare := [index for index, block in enumerate(blocks) if block.mlp is None]:
        where = f"block{'s' * (len(bare) > 1)} {', '.join(map(str, bare))}"
        lines.append(f"a narrow MLP of zeros in {where}, because llama.cpp takes no block without one")
    return tuple(lines)
