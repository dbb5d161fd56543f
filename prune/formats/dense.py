"""The `dense` format: dropped branches stay in the files, and what they write into the residual stream is zero.

It loads anywhere and gives the pruned model's outputs, but saves nothing: the oracle that the other formats
are compared with, and a way into engines that none of them serves.

Only the last weights and biases of a branch become zeros (`surgery.writers`), as the byte that means zero in their
quantization.  Its norms, queries and scales keep their numbers: engines divide by some of them, and 0 / 0 is no number.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dropformer.prune.block_map import Surgery, new_name
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
    """config.json as it was, and the source's tensors with those zero that dropped branches write to the stream by.

    Time and memory beside the copy: a model without weights, and a traced pass of a few tokens.
    Raises PlanError for what zeros cannot express.
    """
    from dropformer.prune.loading.load import weightless  # torch: the default format of a plan does without
    from dropformer.prune.surgery.writers import writers

    check_expressible(writing.surgery, "dense")
    model = weightless(writing.source.folder, writing.how.trust_remote_code)
    silent = writers(model, writing.outline, writing.surgery.layers)
    (folder / "config.json").write_text(json.dumps(writing.config, indent=2) + "\n", encoding="utf-8")
    return writing.copy(folder, lambda name: name, dict(_replaced(writing, silent)))


def check_expressible(surgery: Surgery, name: str) -> None:
    """Raises PlanError for a plan that zeros cannot express; `name`: the format's."""
    if surgery.block_map.mapped:
        raise PlanError(
            f"--format {name} has no place for linear maps; leave out --repair linear, or use --format dropformer"
        )
    for layer in surgery.layers:
        rest = surgery.outline.stack(layer.stack).block(layer.index)
        if layer.kind == "block" and not rest.plain:
            raise PlanError(
                f"{layer} has norms or scales after its sums, which zeros do not take away; drop attn= and mlp= of it, "
                "or use --format dropformer"
            )


def _replaced(writing: ExportJob, silent: Mapping[str, str]) -> Iterator[tuple[str, NewTensor]]:
    """Zeros for what writes to the stream, new values for what is repaired, by tensor name."""
    most = max((span.nbytes for span in writing.source.tensors.values()), default=0) or 1
    fills: dict[int, mmap.mmap] = {}
    written = set()
    yield from writing.repaired_parts.items()
    for tensor, span in writing.source.tensors.items():
        for parameter in writing.parameters(tensor):
            if writer := next((name for name in silent if _part_of(parameter, name)), None):
                written.add(silent[writer])
                if parameter != writer and beside_weight(tensor):
                    continue
                byte = zero_byte(writing.config, tensor, span.dtype)
                fill = fills[byte] if byte in fills else fills.setdefault(byte, _filled(most, byte))
                yield tensor, NewTensor(span.dtype, span.shape, memoryview(fill)[: span.nbytes])
            elif (new := new_name(writing.outline, writing.block_map, parameter)) in writing.repaired:
                yield tensor, writing.repaired[new]
    if missing := sorted(set(silent.values()) - written):
        raise PlanError(f"--format dense finds no tensor for {missing[0]} in the files; use --format dropformer")


def _part_of(parameter: str, writer: str) -> bool:
    """Is a parameter a writer, or codes of it: `down_proj.qweight` for `down_proj.weight`, `down_proj_blocks`?

    A bias is none of the weight's codes.
    """
    owner, _, leaf = writer.rpartition(".")
    given, _, code = parameter.rpartition(".")
    return parameter == writer or (given == owner and leaf in code and ("bias" in leaf) == ("bias" in code))


def _filled(size: int, byte: int) -> mmap.mmap:
    """Memory that holds one byte throughout; zeros cost nothing until they are read."""
    memory = mmap.mmap(-1, size)
    if byte:
        memory[:] = bytes([byte]) * size
    return memory


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
