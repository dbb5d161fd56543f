"""What a matrix of zeros is in a checkpoint's own storage, and what beside a weight must stay as it is.

Scales, zero points and their like are divisors or tables: engines divide activations by them, so that a zero there is
0 / 0.  They stay; only weights and biases become zeros, as the byte that means zero in their quantization.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dropformer.prune.errors import PlanError

# What stands beside a quantized weight, by the last part of its name: `weight_scale_inv`, `absmax`, `g_idx`, ...
BESIDE = re.compile(
    r"scale|zero|zeros?_?point|^zp|absmax|quant_map|quant_state|g_idx|_shape$|^SCB$|weight_format|codebook|lut|_amax$"
    r"|centroid|hadamard|^su$|^sv$|^SU$|^SV$|invperm|^perm|nested|amax|inv_s|smooth|levels|^meta|nbits|group_size",
    re.I,
)
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FN", "F8_E5M2FNUZ", "F8_E4M3FNUZ")


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
    bits = {w.get("num_bits") for w in weights}
    if all(w.get("symmetric", True) for w in weights) and bits <= {4, 8} and len(bits) == 1:
        packed = tensor.endswith("weight_packed")
        return {4: 0x88, 8: 0x80}[bits.pop()] if packed else 0
    raise PlanError(
        f"--format dense cannot write zeros for {tensor}, whose zero points differ by group; use --format dropformer"
    )
