"""Files of any architecture: plans that pack renumber blocks and change nothing else, zeros silence the rest."""

import gguf
import numpy as np
import pytest
from gguf_families import family_gguf, tiny_model

import dropformer
from dropformer.prune.choosing import choose
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import CheckpointError, PlanError
from dropformer.prune.formats.gguf.write import write_gguf
from dropformer.prune.surgery.surgery import plan_surgery


def surgery_of(family, spec, blocks=4):
    model = tiny_model(family, blocks)
    outline = summarize(model, discover(model))
    return model, plan_surgery(outline, choose(outline, spec), model)


def made(tmp_path, family, spec, zeros=False, blocks=4, describe=None):
    """The dense file and the pruned one, as the gguf package reads them."""
    model, surgery = surgery_of(family, spec, blocks)
    dense = family_gguf(tmp_path / "dense.gguf", model, describe)
    report = write_gguf(dense, tmp_path / "pruned.gguf", surgery, zeros=zeros, verify="all")
    assert report.stand_ins == ()
    return gguf.GGUFReader(dense), gguf.GGUFReader(tmp_path / "pruned.gguf")


def refused(tmp_path, family, spec, words, blocks=4, describe=None, **options):
    model, surgery = surgery_of(family, spec, blocks)
    dense = family_gguf(tmp_path / "dense.gguf", model, describe)
    with pytest.raises((CheckpointError, PlanError), match=words) as caught:
        write_gguf(dense, tmp_path / "pruned.gguf", surgery, **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "pruned.gguf").exists()


def tensors(reader):
    return {tensor.name: tensor.data for tensor in reader.tensors}


def block(reader, number):
    start = f"blk.{number}."
    return {name.removeprefix(start): data for name, data in tensors(reader).items() if name.startswith(start)}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "bloom"])
def test_blocks_that_remain_keep_every_tensor_under_their_new_numbers(tmp_path, family):
    old, new = made(tmp_path, family, "block=0,2")
    name = old.fields["general.architecture"].contents()
    assert new.fields["general.architecture"].contents() == name
    assert new.fields[f"{name}.block_count"].contents() == 2
    assert same(block(new, 0), block(old, 1)) and same(block(new, 1), block(old, 3)) and not block(new, 2)
    outside = [{n: d for n, d in tensors(r).items() if not n.startswith("blk.")} for r in (old, new)]
    assert same(*outside)
    for key in old.fields.keys() - {"GGUF.tensor_count", "GGUF.kv_count", f"{name}.block_count"}:
        assert old.fields[key].contents() == new.fields[key].contents()


def test_an_mlp_and_the_next_blocks_attention_leave_the_others_as_one_block(tmp_path):
    old, new = made(tmp_path, "qwen3_moe", "mlp=0,attn=1,mlp=2,attn=3")
    parts = {name: data for name, data in block(old, 0).items() if name.startswith("attn_")}
    parts |= {name: data for name, data in block(old, 1).items() if name.startswith("ffn_")}
    assert same(block(new, 0), parts) and len(block(new, 1)) == len(parts)


def test_a_list_by_block_follows_the_blocks(tmp_path):
    key, values = "qwen3.attention.sliding_window_pattern", [True, False, False, True]
    old, new = made(tmp_path, "qwen3", "block=1", describe=lambda writer: writer.add_array(key, values))
    assert new.fields[key].contents() == [True, False, True]
    assert old.fields[key].types == new.fields[key].types


def test_zeros_take_the_place_of_what_dropped_branches_end_in(tmp_path):
    old, new = made(tmp_path, "qwen2_moe", "attn=1,mlp=2", zeros=True)
    changed = {n for n, data in tensors(new).items() if not np.array_equal(data, tensors(old)[n])}
    assert changed == {"blk.1.attn_output.weight", "blk.2.ffn_down_exps.weight", "blk.2.ffn_down_shexp.weight"}
    assert not any(tensors(new)[name].any() for name in changed)
    assert tensors(old).keys() == tensors(new).keys()


def test_biases_of_dropped_branches_are_zero_too(tmp_path):
    _, new = made(tmp_path, "gpt2", "block=1", zeros=True)
    ends = [f"blk.1.{end}.{leaf}" for end in ("attn_output", "ffn_down") for leaf in ("weight", "bias")]
    assert not any(tensors(new)[name].any() for name in ends)


def test_blocks_without_a_part_are_refused_and_zeros_named(tmp_path):
    refused(tmp_path, "qwen3", "attn=1", "qwen3 an attention and an MLP.*--dense.*--packable")


@pytest.mark.parametrize(
    ("family", "spec", "blocks"),
    [("gemma2", "block=1", 4), ("gemma3_text", "block=0", 7), ("gemma2", "block=0,1,2", 4)],
)
def test_windows_that_would_move_are_refused(tmp_path, family, spec, blocks):
    refused(tmp_path, family, spec, "windows of gemma. by block number", blocks)


def test_a_depth_by_which_llama_cpp_scales_attention_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(dropformer.prune.formats.gguf.stock.SCALED_DEPTHS, "gemma2", 4)
    refused(tmp_path, "gemma2", "block=1,2", "scales the attention of gemma2 by its depth")


@pytest.mark.parametrize(
    ("key", "words"), [("leading_dense_block_count", "counts blocks"), ("nextn_predict_layers", "counts blocks")]
)
def test_keys_that_count_blocks_are_refused(tmp_path, key, words):
    refused(tmp_path, "qwen3", "block=1", words, describe=lambda writer: writer.add_uint32(f"qwen3.{key}", 1))


@pytest.mark.parametrize(
    ("key", "value"), [("qwen3.novelty", [1, 2, 3, 4]), ("qwen3.full_layers", [1]), ("quantize.bits", [4, 4, 8, 8])]
)
def test_a_list_by_block_that_is_not_known_is_refused(tmp_path, key, value):
    words = f"{key} has an entry for each block or names some"
    refused(tmp_path, "qwen3", "block=1", words, describe=lambda writer: writer.add_array(key, value))


def test_a_plan_for_another_depth_is_refused(tmp_path):
    _, surgery = surgery_of("qwen3", "block=1", blocks=3)
    dense = family_gguf(tmp_path / "dense.gguf", tiny_model("qwen3", 4))
    for zeros in (False, True):
        with pytest.raises(PlanError, match="give the file that the plan was made for"):
            write_gguf(dense, tmp_path / "pruned.gguf", surgery, zeros=zeros)
