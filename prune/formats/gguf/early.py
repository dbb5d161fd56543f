"""What a .gguf file and the kinds or numbers of the layers to drop show to be impossible, before a model is opened."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from dropformer.prune.architecture import Layer
from dropformer.prune.formats.gguf.header import read_gguf_header
from dropformer.prune.formats.gguf.layout import OUTSIDE, GgufBlock, read_dense
from dropformer.prune.formats.gguf.planned import no_repairs, unpaired
from dropformer.prune.formats.gguf.source import GgufSource, read_source
from dropformer.prune.formats.gguf.stock import renumbered, stock_pairs
from dropformer.prune.formats.registry import ExportFacts


def check_file(facts: ExportFacts) -> None:
    """Raises CheckpointError for a file that has no pruned form, or none under the layers that are to be dropped."""
    path = Path(facts.model).expanduser()
    if not path.is_file():  # a recipe's, which is converted first
        return
    header = read_gguf_header(path)
    source = read_source(header, path.name)
    if source.architecture in OUTSIDE and not source.experts:
        read_dense(header, path.name)
        return
    if not facts.may_pack:
        raise unpaired(source)
    if facts.repairs:
        raise no_repairs(source)
    if facts.layers is not None and all(-source.blocks <= layer.index < source.blocks for layer in facts.layers):
        blocks = blocks_left(source, facts.layers)
        renumbered(source, blocks)
        stock_pairs(source, blocks, None)


def blocks_left(source: GgufSource, dropped: Collection[Layer]) -> list[GgufBlock]:
    """The blocks of the new file.  Raises CheckpointError where what is left does not pair up.

    Branches are numbered A0 M0 A1 M1 ... = 0 1 2 3 ...; without 1 and 2 there remain A0 with M1, and so on.
    """
    gone = {2 * (layer.index % source.blocks) + (layer.kind == "mlp") for layer in dropped}
    left = [k for k in range(2 * source.blocks) if k not in gone]
    if len(left) % 2 or any(k % 2 != i % 2 for i, k in enumerate(left)):
        raise unpaired(source)
    pairs = zip(left[::2], left[1::2], strict=True)
    return [GgufBlock(place, a // 2, True, m // 2) for place, (a, m) in enumerate(pairs)]
