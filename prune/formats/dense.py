"""The `dense` format: dropped branches stay in the files as zeros.

It loads anywhere and gives the pruned model's outputs, but saves nothing: the oracle that the other formats
are compared with, and a way into engines that none of them serves.

Scales, zero points and their like are divisors or tables: engines divide activations by them, so that a zero there is
0 / 0.  They stay; only weights and biases become zeros, as the byte that means zero in their quantization.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dropformer.prune.architecture import Layer, owns
from dropformer.prune.block_map import new_name
from dropformer.prune.errors import PlanError
from dropformer.prune.files import CopyReport, NewTensor
from dropformer.prune.formats.writing import ExportJob

# Companions of a quantized weight, by the last part of their names: `weight_scale_inv`, `absmax`, `g_idx`, ...
BESIDE = re.compile(
    r"scale|zero|zeros?_?point|^zp|absmax|quant_map|quant_state|g_idx|_shape$|^SCB$|weight_format|codebook|lut|_amax$"
    r"|centroid|hadamard|^su$|^sv$|^SU$|^SV$|invperm|^perm|nested|amax|inv_s|smooth|levels|^meta|nbits|group_size",
    re.I,
)
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FN", "F8_E5M2FNUZ", "F8_E4M3FNUZ")


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
            if owns(branch.modules, rest):
                return Layer(branch.kind, int(index), stack.name)
    return None


def beside_weight(tensor: str) -> bool:
    """Is a tensor a scale, a zero point or a table beside a weight, rather than a weight or a bias?"""
    return bool(BESIDE.search(tensor.rpartition(".")[2]))


def zero_byte(config: Mapping[str, Any], tensor: str, dtype: str) -> int:
    """The byte that, repeated, makes a tensor of zeros.

    4-bit codes count from 0, so that zero is in the middle: 0x88 in compressed-tensors, 0x77 in NF4.  Raises PlanError
    where the method's zero is not one byte (GPTQ and AWQ have zero points for each group).
    """
    if dtype in FLOATS:
        return 0
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    method = str(settings.get("quant_method", ""))
    if method == "bitsandbytes":
        four = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
        return 0x77 if four and settings.get("bnb_4bit_quant_type") == "nf4" else 0
    if method in ("mxfp4", "modelopt", "fp8", "nvfp4", "fbgemm_fp8"):
        return 0
    if method == "compressed-tensors":
        return _compressed(settings, tensor)
    raise PlanError(
        f"--format dense cannot write zeros for {tensor}, quantized by {method or 'an unnamed method'}; use --format "
        "dropformer, or prune the original and quantize it then"
    )


def _compressed(settings: Mapping[str, Any], tensor: str) -> int:
    groups = (settings.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups if isinstance(group, Mapping)]
    if not str(settings.get("format", "")).startswith("pack") and not any("int" in str(w.get("type")) for w in weights):
        return 0  # floating-point codes
    bits = {int(w.get("num_bits") or 0) for w in weights}
    if all(w.get("symmetric", True) for w in weights) and bits <= {4, 8} and len(bits) == 1:
        packed = tensor.endswith("weight_packed")
        return {4: 0x88, 8: 0x80}[bits.pop()] if packed else 0
    raise PlanError(
        f"--format dense cannot write zeros for {tensor}, whose zero points differ by group; use --format dropformer"
    )
