"""How branches write into the stream is read off the dataflow, in every dtype and on the meta device alike."""

import copy

import pytest
import torch
from family_sizes import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from dropformer.metrics.repair.adapters import adapters
from dropformer.metrics.repair.distill import trainable
from dropformer.metrics.repair.slots import branch_outputs
from dropformer.prune.architecture import Layer
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.replay import reading
from dropformer.prune.samples.inputs import sample_inputs

KINDS = {
    "llama": ("linear", "linear"),
    "gpt2": ("linear", "linear"),
    "phi": ("linear", "linear"),
    "gptj": ("linear", "linear"),
    "gemma2": ("norm", "norm"),
    "gemma3_text": ("norm", "norm"),
    "olmo2": ("norm", "norm"),
    "mixtral": ("linear", None),
    "granite": ("linear", "linear"),
    "qwen3_next": ("linear", None),
    "jamba": ("linear", None),
    "nemotron_h": ("linear",),
}


@pytest.mark.parametrize("family", KINDS)
def test_every_family_has_its_slots_and_a_reason_where_there_is_none(tiny, family):
    model = tiny(family, **SIZES.get(family, {}))
    found = branch_outputs(model, discover(model))
    block = {layer.kind: output for layer, output in found.items() if layer.index == 1}
    kinds = tuple(block[kind].slot and block[kind].slot.kind for kind in ("attn", "mlp") if kind in block)
    assert kinds == KINDS[family]
    assert all(output.reason for output in found.values() if output.slot is None)


def test_weights_that_have_several_places_are_repaired_by_nothing(tiny):
    model = tiny("llama")
    first, later = model.model.layers[1].mlp.down_proj, model.model.layers[3].mlp.down_proj
    later.weight = first.weight  # as Zamba's hybrid blocks share their attention
    found = branch_outputs(model, discover(model))
    assert Layer("mlp", 2) in found and not {Layer("mlp", 1), Layer("mlp", 3)} & found.keys()
    places = [f"model.layers.{i}" for i in range(4)]
    assert [path for path in adapters(model, places, 2) if "down_proj" in path] == [
        "model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj",
    ]  # fmt: skip
    taught = trainable(copy.deepcopy(model.model.layers[3]), model, "model.layers.3")
    assert "mlp.up_proj.weight" in taught and "mlp.down_proj.weight" not in taught


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "mixtral", "phi"])
def test_what_is_read_at_the_outputs_is_what_the_branch_adds(tiny, family):
    """Granite multiplies it by a constant on the way."""
    model = tiny(family, **SIZES.get(family, {}))
    architecture = discover(model)
    block = architecture.stacks[0].blocks[2]
    outputs = branch_outputs(model, architecture)
    taps = {tap for layer, output in outputs.items() if layer.index == 2 for tap, _ in output.taps}
    taps |= {tap for b in block.branches for tap in (b.before, b.after, *b.delta) if tap}
    with torch.no_grad(), reading(model, list(taps)) as seen:
        model(**sample_inputs(model))
    for branch in block.branches:
        parts = outputs[Layer(branch.kind, 2)].taps
        expected = seen[branch.after] - seen[branch.before] if branch.after else sum(seen[tap] for tap in branch.delta)
        torch.testing.assert_close(sum(seen[tap] * scale for tap, scale in parts), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "granite"])
def test_sixteen_bits_and_models_without_weights_show_the_same_slots(tiny, family):
    model = tiny(family, **SIZES.get(family, {}))
    architecture = discover(model)
    expected = branch_outputs(model, architecture)
    assert branch_outputs(model.to(torch.bfloat16), architecture) == expected
    assert branch_outputs(model.to(torch.float16), architecture) == expected
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**vars(model.config)}))
    assert branch_outputs(blank, discover(blank)) == expected
