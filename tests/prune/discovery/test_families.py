"""What single families taught: a state handed on in a tuple, names renamed twice, two cache entries a block."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dropformer
from dropformer import api
from dropformer.prune.block_map import Surgery, map_blocks
from dropformer.prune.choosing import choose
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.discovery.trace import tracing
from dropformer.prune.errors import PlanError
from dropformer.prune.formats.export import reference
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from families.tiny_models import tiny_model


def pruned(model, spec, shorten=True):
    outline = summarize(model, discover(model))
    layers = choose(outline, spec)
    small = copy.deepcopy(model)
    short = plan_surgery(outline, layers, small)
    kept = Surgery(outline, tuple(layers), map_blocks(outline, layers, shorten=False))
    return apply_surgery(small, short if shorten else kept)


def through_disk(family, spec, tmp_path):
    """The pruned model in memory and after export and reload."""
    folder = tmp_path / "dense"
    tiny_model(family).save_pretrained(folder)
    opened = api.LoadedModel(dropformer.load(folder), None, folder, reference("m", folder), None)
    small = api.drop(opened, api.plan_unscored(opened.ref, api.outline(opened.model), spec, (), None))
    api.save(small, tmp_path / "out")
    return small, dropformer.load(tmp_path / "out")


def logits(model, ids, cache):
    made = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache,
                          output_logits=True, return_dict_in_generate=True)  # fmt: skip
    return torch.stack(made.logits)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x, mask=None, state=None):
        return self.mix(x), (x.sum(1), x.mean(1))


def test_a_state_in_a_tuple_is_matched_with_the_input_named_so():
    with tracing(model := Recurrent()) as trace:
        model(torch.ones(2, 3, 4), None, None)
    call = trace.calls_of("")[0]
    assert call.nested == {1}
    assert call.state == 2


@pytest.mark.parametrize("spec", ["attn=1,2", "block=1"])
def test_a_dropped_recurrence_hands_its_state_back(ids, spec):
    small = pruned(tiny_model("xlstm"), spec, shorten=False)
    torch.testing.assert_close(logits(small, ids, True), logits(small, ids, False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["axk1", "laguna"])
def test_tensors_are_renamed_once_on_loading(ids, tmp_path, family):
    small, again = through_disk(family, "attn=1,2", tmp_path)
    torch.testing.assert_close(again(ids).logits, small(ids).logits)


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
def test_infinities_and_derived_vectors_survive_export(ids, tmp_path, family):
    small, again = through_disk(family, "attn=1", tmp_path)
    torch.testing.assert_close(again(ids).logits, small(ids).logits)


@pytest.mark.parametrize("shorten", [True, False])
def test_blocks_with_two_attentions_keep_two_cache_entries(ids, shorten):
    small = pruned(tiny_model("longcat_flash"), "block=1", shorten)
    layers = small(ids, use_cache=True).past_key_values.layers
    held = [i for i, layer in enumerate(layers) if getattr(layer, "keys", None) is not None]
    assert held == ([0, 1, 2, 3, 4, 5] if shorten else [0, 1, 4, 5, 6, 7])
    torch.testing.assert_close(logits(small, ids, True), logits(small, ids, False), rtol=1e-4, atol=1e-5)


def test_the_text_part_of_a_composite_config_marks_empty_entries(ids):
    small = pruned(tiny_model("gemma4_unified"), "attn=1")
    layers = small(ids, use_cache=True).past_key_values.layers
    assert [i for i, layer in enumerate(layers) if getattr(layer, "keys", None) is None] == [1]


@pytest.mark.parametrize("spec", ["block=1", "block=3"])
def test_embeddings_of_every_layer_keep_the_blocks_where_they_are(spec):
    model = tiny_model("gemma4_text")
    outline = summarize(model, discover(model))
    surgery = plan_surgery(outline, choose(outline, spec), copy.deepcopy(model))
    assert surgery.block_map.in_place(outline)
    assert "embed_tokens_per_layer" in surgery.note or "gives each of them tensors of its own" in surgery.note


def test_a_module_with_a_table_of_positions_keeps_the_blocks_where_they_are(ids):
    model = tiny_model("zamba2")
    outline = summarize(model, discover(model))
    surgery = plan_surgery(outline, choose(outline, "block=2"), copy.deepcopy(model))
    assert surgery.block_map.in_place(outline)
    assert "depends on the number" in surgery.note
    small = apply_surgery(copy.deepcopy(model), surgery)
    torch.testing.assert_close(logits(small, ids, True), logits(small, ids, False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("spec, kept", [("attn=1", True), ("block=1", False)])
def test_numbered_prediction_heads_go_with_the_numbers_at_any_depth(ids, tmp_path, spec, kept, depth):
    """DeepSeek V3 keeps them as blocks too many, of which its class leaves out number 61 alone on loading."""
    model = tiny_model("deepseek_v3", num_nextn_predict_layers=depth)
    folder = tmp_path / "dense"
    model.save_pretrained(folder)
    names = [f"model.layers.{i}.{name}" for i in range(4, 4 + depth) for name in ("eh_proj.weight", "mlp.gate.weight")]
    head = {name: torch.ones(3, 3) for name in names}
    save_file({**load_file(folder / "model.safetensors"), **head}, folder / "model.safetensors", {"format": "pt"})
    opened = api.LoadedModel(dropformer.load(folder), None, folder, reference("m", folder), None)
    small = api.drop(opened, api.plan_unscored(opened.ref, api.outline(opened.model), spec, (), None))
    out = api.save(small, tmp_path / "out").path
    assert bool(head.keys() & load_file(out / "model.safetensors").keys()) == kept
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == depth * kept
    torch.testing.assert_close(dropformer.load(out)(ids).logits, small(ids).logits)


def test_a_shorter_stack_that_the_family_does_not_allow_keeps_its_blocks(ids):
    """Gemma 4's last blocks read the keys and values of earlier ones, of which one of each kind must be left."""
    types = ["sliding_attention", "full_attention"] * 2
    model = tiny_model("gemma4_text", layer_types=types, num_kv_shared_layers=2)
    outline = summarize(model, discover(model))
    surgery = plan_surgery(outline, choose(outline, "block=3"), copy.deepcopy(model))
    assert surgery.block_map.in_place(outline)
    assert "transformers builds no shorter model" in surgery.note
    small = apply_surgery(copy.deepcopy(model), surgery)
    torch.testing.assert_close(logits(small, ids, True), logits(small, ids, False), rtol=1e-4, atol=1e-5)


def test_keys_and_values_that_later_blocks_read_stay():
    types = ["sliding_attention", "full_attention"] * 2
    found = discover(tiny_model("gemma4_text", layer_types=types, num_kv_shared_layers=2)).stacks[0]
    assert [sorted(block.kept) for block in found.blocks] == [["attn"], ["attn"], [], []]


def test_a_hybrid_keeps_a_layer_with_keys_and_values():
    model = tiny_model("bamba")  # attention in blocks 1 and 3, state-space mixers in the others
    outline = summarize(model, discover(model))
    with pytest.raises(PlanError, match="every layer with keys and values"):
        choose(outline, "attn=1,3")
    assert len(choose(outline, "attn=0,2,3")) == 3
