"""The `dense` format: dropped branches stay in the files as zeros.

It loads anywhere and gives the pruned model's outputs, but saves nothing: the oracle that the other formats
are compared with, and a way into engines that none of them serves.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path

from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import new_name
from dropformer.prune.errors import PlanError
from dropformer.prune.files import CopyReport, NewTensor
from dropformer.prune.formats.writing import ExportJob
from dropformer.prune.formats.zeros import beside_weight, zero_byte


def write_dense(writing: ExportJob, folder: Path) -> CopyReport:
    """config.json as it was, and the source's tensors with the weights and biases of dropped branches set to zero.

    Zeros in all of a branch's weights, its norms and biases too, are exactly a drop: what it adds is zero.  The scales
    of quantized weights and of activations stay, since engines divide by them.
    Raises PlanError for what zeros cannot express.
    """
    _check_expressible(writing)
    (folder / "config.json").write_text(json.dumps(writing.config, indent=2) + "\n", encoding="utf-8")
    return writing.copy(folder, lambda name: name, dict(_replaced(writing)))


def _check_expressible(writing: ExportJob) -> None:
    if writing.block_map.mapped:
        raise PlanError(
            "--format dense has no place for linear maps; leave out --repair linear, or use --format dropformer"
        )
    for layer in writing.surgery.layers:
        rest = writing.outline.stack(layer.stack).block(layer.index)
        if layer.kind == "block" and not rest.plain:
            raise PlanError(
                f"{layer} has norms or scales after its sums, which zeros do not take away; drop attn= and mlp= of it, "
                "or use --format dropformer"
            )


def _replaced(writing: ExportJob) -> Iterator[tuple[str, NewTensor]]:
    """Zeros for what is dropped, new values for what is repaired, by tensor name."""
    gone = set(writing.outline.branch_layers(writing.surgery.layers))
    most = max((span.nbytes for span in writing.source.tensors.values()), default=0) or 1
    fills: dict[int, mmap.mmap] = {}
    for tensor, span in writing.source.tensors.items():
        for parameter in writing.parameters(tensor):
            if _owner(writing, parameter) in gone:
                if beside_weight(tensor):
                    continue
                byte = zero_byte(writing.config, tensor, span.dtype)
                fill = fills[byte] if byte in fills else fills.setdefault(byte, _filled(most, byte))
                yield tensor, NewTensor(span.dtype, span.shape, memoryview(fill)[: span.nbytes])
            elif (new := new_name(writing.outline, writing.block_map, parameter)) in writing.repaired:
                yield tensor, writing.repaired[new]


def _filled(size: int, byte: int) -> mmap.mmap:
    """Memory that holds one byte throughout; zeros cost nothing until they are read."""
    memory = mmap.mmap(-1, size)
    if byte:
        memory[:] = bytes([byte]) * size
    return memory


def _owner(writing: ExportJob, parameter: str) -> Layer | None:
    """The branch whose own a parameter is."""
    for stack in writing.outline.stacks:
        index, _, rest = parameter.removeprefix(stack.path + ".").partition(".")
        if not parameter.startswith(stack.path + ".") or not index.isdecimal() or int(index) >= stack.blocks:
            continue
        for branch in stack.of_block(int(index)):
            if any(rest == module or rest.startswith(module + ".") for module in branch.modules):
                return Layer(branch.kind, int(index), stack.name)
    return None
