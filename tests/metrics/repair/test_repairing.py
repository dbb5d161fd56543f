"""Which repairs a drop gets: closed forms before a projection, distilled blocks where there is none."""

import pytest

from dropformer.metrics.repair.slots import BranchOutput
from dropformer.metrics.search.strategy import quality
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import ArchitectureError


def told(improver, name, layers, **settings):
    found, said = improver(quality(name), **settings), []
    found.tell = said.append
    repair, _ = found.repair([Layer.parse(layer) for layer in layers])
    return repair, said


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "mixtral"])
def test_where_no_projection_is_before_the_gap_blocks_are_distilled(improver, family):
    repair, said = told(improver, "best", ["attn:2"], family=family)
    assert any(line.startswith("no projection before a gap to refit (mlp:1), so blocks are distilled") for line in said)
    assert any(line.startswith("distill: block 1") for line in said) and not any("refit-all" in line for line in said)
    assert not repair.unrepaired
    projections = {name for name, tensor in repair.tensors.items() if tensor.ndim >= 2}
    assert {"1", "2"} <= {name.split(".")[2] for name in projections}


def test_where_a_projection_is_closed_forms_repair(improver):
    repair, said = told(improver, "best", ["attn:2"])
    assert repair.tensors and not any("distill" in line for line in said)


def test_whoever_names_repairs_gets_these():
    named, norm = quality("best", repair="refit,refit-all"), [BranchOutput((), None)]
    assert named.behind(norm) == ("refit", "refit-all")
    assert quality("best").behind(norm) == ("refit", "distill")
    assert quality("healed").behind(norm) == ("refit", "lora")


def test_distillation_starts_with_norms_as_they_were(improver):
    """Scales that a refit gave to norms elsewhere are gone; those of the trained blocks are trained from the dense."""
    alone, repair = improver(quality(repair="distill"), family="gemma3_text"), None
    want, _ = alone.repair([Layer("attn", 2)])
    after = improver(quality(repair="refit-all,distill"), family="gemma3_text")
    repair, _ = after.repair([Layer("attn", 2)])
    assert repair.tensors.keys() == want.tensors.keys()
    assert all((repair.tensors[name] == tensor).all() for name, tensor in want.tensors.items())
    scaled, _ = improver(quality(repair="refit-all"), family="gemma3_text").repair([Layer("attn", 2)])
    assert scaled.tensors.keys() - want.tensors.keys()


def test_distillation_keeps_a_map_that_stands_where_a_norm_was(improver):
    layer = Layer("attn", 1)
    repair, _ = improver(quality(repair="linear,distill"), family="gemma3_text").repair([layer])
    path = "model.layers.1.post_attention_layernorm"
    assert layer in repair.mapped and repair.tensors[f"{path}.weight"].ndim == 2
    assert repair.tensors[f"{path}.weight"].abs().max() > 0 and repair.tensors[f"{path}.bias"].abs().max() > 0


def test_a_layer_that_adds_the_stream_itself_takes_no_map_and_that_is_said(improver):
    layer, found = Layer("attn", 1), improver(quality(repair="linear"), family="bloom")
    repair, _ = found.repair([layer])
    assert not repair.mapped and [name for name, _ in repair.unrepaired] == ["linear: attn:1"]
    with pytest.raises(ArchitectureError, match="attn:1 cannot become linear"):
        found.maps([layer])


@pytest.mark.parametrize("name", ["best", "healed"])
def test_a_block_that_its_model_asks_for_settings_is_passed_by_in_searches_too(improver, name):
    """Nemotron-H reads `block_type` of each block before it runs it."""
    found = improver(quality(name), family="nemotron_h")
    layer = next(layer for layer in found.outputs if layer.kind == "attn")
    repair, variant = found.repair([layer])
    assert variant.dropped and (repair.tensors or repair.unrepaired)
