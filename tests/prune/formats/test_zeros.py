"""Zeros of the dense format: the byte that means zero in each quantization, and nothing that engines divide by."""

import pytest

from dropformer.prune.errors import PlanError
from dropformer.prune.formats.dense import beside_weight, zero_byte

WEIGHTS = "weight bias qweight weight_packed gate_up_proj gate_up_proj_blocks down_proj_bias A_log dt_bias"
BESIDE = """weight_scale weight_scale_inv weight_scale_2 input_scale activation_scale k_scale scales qzeros g_idx absmax
weight_zero_point weight_shape weight_global_scale input_global_scale SCB quant_map bitsandbytes__nf4.quant_state
gate_up_proj_scales nested_absmax codebooks"""


@pytest.mark.parametrize("leaf", WEIGHTS.split())
def test_weights_and_biases_become_zeros(leaf):
    assert not beside_weight(f"model.layers.0.mlp.{leaf}")


@pytest.mark.parametrize("leaf", BESIDE.split())
def test_scales_zero_points_and_tables_stay(leaf):
    assert beside_weight(f"model.layers.0.mlp.up_proj.{leaf}")


def packed(bits, **weights):
    group = {"weights": {"num_bits": bits, "type": "int", **weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    "settings, dtype, byte",
    [
        ({}, "BF16", 0),
        (NF4, "U8", 0x77),
        (packed(4), "I32", 0x88),
        (packed(8), "I32", 0x80),
        ({"quant_method": "mxfp4"}, "U8", 0),
    ],
)
def test_each_method_has_its_zero(settings, dtype, byte):
    assert zero_byte({"quantization_config": settings}, "model.layers.0.mlp.up_proj.weight_packed", dtype) == byte


@pytest.mark.parametrize(
    "settings", [{"quant_method": "gptq"}, {"quant_method": "awq"}, packed(4, symmetric=False), {}]
)
def test_codes_without_one_zero_are_refused_by_name(settings):
    with pytest.raises(PlanError, match="up_proj"):
        zero_byte({"quantization_config": settings}, "model.layers.0.mlp.up_proj.qweight", "I32")
