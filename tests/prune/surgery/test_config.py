"""The config follows the surgery: counts, lists with one entry per block, lists of block indices."""

import json

import pytest
import torch

import dropformer
from dropformer import api
from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import map_blocks
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.formats.export import reference
from dropformer.prune.outline import BranchOutline, Outline, StackOutline
from dropformer.prune.surgery.config import pruned_config


def outline(blocks=4, **fields):
    attn = BranchOutline(kind="attn", blocks=list(range(blocks)), modules={"mixer": "zeros"}, parameters=1)
    return Outline(stacks=[StackOutline(path="model.layers", blocks=blocks, branches=[attn], **fields)], parameters=9)


def follow(config, dropped, **fields):
    found = outline(**fields)
    return pruned_config(config, found, map_blocks(found, [Layer("block", i) for i in dropped]))


class TestExportOfAConfigWithoutItsDerivedLists:
    """Published configs of Gemma 2 say nothing of layer_types: transformers derives every other block."""

    @pytest.fixture
    def folder(self, tiny, tmp_path):
        tiny("gemma2", sliding_window=4, head_dim=8).save_pretrained(tmp_path / "dense")
        path = tmp_path / "dense" / "config.json"
        config = json.loads(path.read_text())
        del config["layer_types"]
        path.write_text(json.dumps(config))
        return tmp_path / "dense"

    def test_windows_stay_with_their_blocks(self, folder, ids):
        model = dropformer.load(folder)
        opened = api.LoadedModel(model, None, folder, reference("m", folder), None)
        plan = api.plan_unscored(opened.ref, api.outline(model), "block=0", (), None)
        pruned = api.drop(opened, plan)
        api.save(pruned, folder.parent / "out")
        assert json.loads((folder.parent / "out" / "config.json").read_text())["layer_types"][0] == "full_attention"
        again = dropformer.load(folder.parent / "out")
        torch.testing.assert_close(again(ids).logits, pruned(ids).logits)


def test_a_pattern_of_letters_loses_those_of_dropped_blocks():
    config = {"hybrid_override_pattern": "M-*E", "num_hidden_layers": 4}
    assert follow(config, [1]) == {"hybrid_override_pattern": "M*E", "num_hidden_layers": 3}


def test_a_list_alone_may_count_the_blocks():
    assert follow({"layers_block_type": ["a", "b", "c", "d"]}, [0, 3]) == {"layers_block_type": ["b", "c"]}


def test_lists_of_block_indices_are_renumbered():
    config = {"num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "full_attn_idxs": [0, 2]}
    assert follow(config, [0]) == {"num_hidden_layers": 3, "hybrid_layer_ids": [0, 2], "full_attn_idxs": [1]}


@pytest.mark.parametrize("value", [["a", "b", "c", "d"], [1, 3]])
def test_an_unknown_list_by_block_is_an_error(value):
    with pytest.raises(ArchitectureError, match="does not know how it follows"):
        follow({"num_hidden_layers": 4, "strange": value}, [0])


@pytest.mark.parametrize("field", [{"eos_token_id": [1, 2]}, {"time_step_limit": [0.0, 1.0]}, {"sizes": [3, 2]}])
def test_other_lists_stay(field):
    assert follow({"num_hidden_layers": 4, **field}, [0]) == {"num_hidden_layers": 3, **field}


def test_a_block_with_two_cache_entries_leaves_both_empty():
    found = outline(caches=2)
    config = {"model_type": "x", "num_layers": 4, "num_hidden_layers": 8}
    new = pruned_config(config, found, map_blocks(found, [Layer("attn", 1)], shorten=False))
    assert new["dropformer_no_cache"] == [2, 3]


def test_reformers_kinds_of_attention_follow_their_blocks():
    config = {"num_hidden_layers": 4, "attn_layers": ["local", "lsh", "lsh", "local"]}
    assert follow(config, [1]) == {"num_hidden_layers": 3, "attn_layers": ["local", "lsh", "local"]}
    assert follow({"attn_layers": ["local", "lsh", "local", "lsh"]}, [0]) == {"attn_layers": ["lsh", "local", "lsh"]}
