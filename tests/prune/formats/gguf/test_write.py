"""A pruned GGUF file holds the kept tensors' bytes under the keys that llama.cpp's deci architecture reads."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import tiny_model, write_gguf

from dropformer.metrics.repair.linear import linear_forms
from dropformer.prune.architecture import Layer
from dropformer.prune.choosing import choose
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import CheckpointError, OutputError, PlanError, VerificationError
from dropformer.prune.formats.gguf.keys import interleaved
from dropformer.prune.formats.gguf.write import write_gguf as prune_gguf
from dropformer.prune.surgery.surgery import plan_surgery

KINDS = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_1")}


@cache
def architecture_of(family, blocks):
    return discover(tiny_model(family, blocks=blocks))


def surgery_of(model, spec, mapped=()):
    architecture = architecture_of(model.config.model_type, model.config.num_hidden_layers)
    outline = summarize(model, architecture)
    width = model.config.hidden_size
    forms = {layer: short(linear_forms(model, architecture, layer, width), layer) for layer in mapped}
    return plan_surgery(outline, [*choose(outline, spec)], model, forms)


def short(forms, layer):
    """The forms by the modules' names within the block."""
    return {name.partition(f".{layer.index}.")[2]: form for name, form in forms.items()}


def make(tmp_path, spec, family="llama", kind="F32", **options):
    """A dense file, its pruned one, both read by the gguf package, and the report."""
    blocks = options.pop("blocks", 4)
    model = tiny_model(family, blocks=blocks, **options.pop("shape", {}))
    write = {key: options.pop(key) for key in ("edit", "describe") if key in options}
    dense = write_gguf(tmp_path / "dense.gguf", model, KINDS[kind], **write)
    report = prune_gguf(dense, tmp_path / "pruned.gguf", surgery_of(model, spec), **options)
    return gguf.GGUFReader(dense), gguf.GGUFReader(tmp_path / "pruned.gguf"), report


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def tensors(reader):
    return {t.name: t for t in reader.tensors}


def value(reader, key):
    return reader.fields[key].contents()


def same(one, other):
    return one.tensor_type == other.tensor_type and np.array_equal(one.data, other.data)


def expected_names(old, kept):
    """New name -> old name: all outside of the blocks, and the given parts, [(attention, mlp), ...]."""
    found = {name: name for name in old if not name.startswith("blk.")}
    for new, (attention, mlp) in enumerate(kept):
        for part, block in (("attn_", attention), ("ffn_", mlp)):
            for name in old:
                if name.startswith(f"blk.{block}.{part}"):
                    found[name.replace(f"blk.{block}.", f"blk.{new}.")] = name
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_dropped_attention_leaves_every_other_tensor_with_its_bytes(tmp_path, kind, tied):
    dense, pruned, report = make(tmp_path, "attn=1,3", kind=kind, shape={"tied": tied}, verify="all")
    old, new = tensors(dense), tensors(pruned)
    names = expected_names(old, [(0, 0), (None, 1), (2, 2), (None, 3)])
    assert set(new) == set(names) and ("output.weight" in new) is not tied
    assert all(same(new[name], old[names[name]]) for name in names)
    assert report.architecture == "deci" and report.stand_ins == ()
    assert report.copied.tensors_kept == len(new) and report.copied.tensors_dropped == len(old) - len(new)
    assert report.copied.bytes_before == sum(t.n_bytes for t in dense.tensors)
    assert report.copied.bytes_after == sum(t.n_bytes for t in pruned.tensors)


def test_the_keys_say_which_block_has_what(tmp_path):
    _, pruned, _ = make(tmp_path, "attn=1,3,mlp=2")
    assert value(pruned, "general.architecture") == "deci"
    assert value(pruned, "deci.block_count") == 4
    assert value(pruned, "deci.attention.head_count") == [4, 0, 4, 0]
    assert value(pruned, "deci.attention.head_count_kv") == [2, 0, 2, 0]
    assert value(pruned, "deci.feed_forward_length") == [96, 96, 256, 96]
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert value(pruned, f"deci.{key}") == 16
    assert not [key for key in pruned.fields if key.startswith("llama.")]


def test_every_other_key_is_carried_over(tmp_path):
    def describe(writer):
        writer.add_string("general.url", "")  # the gguf package's own writer leaves out what is empty
        writer.add_key_value("my.empty", "", gguf.GGUFValueType.STRING)
        writer.add_array("my.scores", [0.5, -1.5])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)

    dense, pruned, _ = make(tmp_path, "attn=1", describe=describe, record='{"spec": "attn=1"}')
    shape = {"block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv"}
    for key in dense.fields:
        prefix, _, rest = key.partition(".")
        if prefix != "GGUF" and key != "general.architecture" and rest not in shape:
            new = f"deci.{rest}" if prefix == "llama" else key
            assert value(pruned, new) == value(dense, key) and pruned.fields[new].types == dense.fields[key].types
    assert value(pruned, "dropformer.record") == '{"spec": "attn=1"}'
    assert value(pruned, "deci.rope.scaling.type") == "yarn" and value(pruned, "tokenizer.ggml.token_type")[:4] == [
        3,
        3,
        3,
        1,
    ]


def test_whole_blocks_leave_an_ordinary_shorter_file(tmp_path):
    dense, pruned, report = make(tmp_path, "block=1,2", kind="Q4_1")
    old, new = tensors(dense), tensors(pruned)
    names = expected_names(old, [(0, 0), (3, 3)])
    assert set(new) == set(names) and all(same(new[name], old[names[name]]) for name in names)
    assert report.architecture == value(pruned, "general.architecture") == "llama"
    assert value(pruned, "llama.block_count") == 2 and value(pruned, "llama.attention.head_count") == 4


def test_an_mlp_pairs_with_the_attention_before_it(tmp_path):
    dense, pruned, report = make(tmp_path, "mlp=1,attn=2", family="qwen2")
    old, new = tensors(dense), tensors(pruned)
    names = expected_names(old, [(0, 0), (1, 2), (3, 3)])
    assert set(new) == set(names) and all(same(new[name], old[names[name]]) for name in names)
    assert report.architecture == "qwen2" and value(pruned, "qwen2.block_count") == 3


def test_blocks_that_lost_everything_go_though_others_lost_a_part(tmp_path):
    dense, pruned, _ = make(tmp_path, "block=1,attn=3")
    old, new = tensors(dense), tensors(pruned)
    names = expected_names(old, [(0, 0), (2, 2), (None, 3)])
    assert set(new) == set(names) and all(same(new[name], old[names[name]]) for name in names)
    assert value(pruned, "deci.attention.head_count") == [4, 4, 0]


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_qwen2_rows_take_the_rotary_order_of_deci_and_nothing_else_moves(tmp_path, kind):
    dense, pruned, _ = make(tmp_path, "attn=1", family="qwen2", kind=kind, verify="all")
    old, new = tensors(dense), tensors(pruned)
    order = [head * 16 + j + part for head in range(4) for j in range(8) for part in (0, 8)]
    for name, heads in (("attn_q", 4), ("attn_k", 2)):
        for end in ("weight", "bias"):
            key = f"blk.2.{name}.{end}"
            assert np.array_equal(new[key].data, old[key].data[order[: heads * 16]])
            assert not np.array_equal(new[key].data, old[key].data)
    names = expected_names(old, [(0, 0), (None, 1), (2, 2), (3, 3)])
    assert set(new) == set(names)
    assert all(same(new[n], old[names[n]]) for n in names if "attn_q" not in n and "attn_k" not in n)


def test_block_0_without_attention_gets_one_head_of_zeros(tmp_path):
    _, pruned, report = make(tmp_path, "attn=0,2", kind="Q8_0")
    new = tensors(pruned)
    assert value(pruned, "deci.attention.head_count") == [1, 4, 0, 4]
    assert value(pruned, "deci.attention.head_count_kv") == [1, 2, 0, 2]
    for name, shape in (("q", [64, 16]), ("k", [64, 16]), ("v", [64, 16]), ("output", [16, 64])):
        tensor = new[f"blk.0.attn_{name}.weight"]
        assert list(tensor.shape) == shape and not tensor.data.any()
        assert tensor.tensor_type == KINDS["F16" if name == "output" else "Q8_0"]  # rows of 16 are no block of Q8_0
    assert "blk.0.attn_norm.weight" in new and "blk.2.attn_norm.weight" not in new
    assert len(report.stand_ins) == 1 and "block 0" in report.stand_ins[0]


def test_a_dropped_mlp_becomes_a_narrow_one_of_zeros(tmp_path):
    dense, pruned, report = make(tmp_path, "mlp=1,3", kind="Q4_1")
    new = tensors(pruned)
    for block in (1, 3):
        for name, shape in (("gate", [64, 256]), ("up", [64, 256]), ("down", [256, 64])):
            tensor = new[f"blk.{block}.ffn_{name}.weight"]
            assert list(tensor.shape) == shape and tensor.tensor_type == KINDS["Q4_1"] and not tensor.data.any()
    assert same(new["blk.1.attn_q.weight"], tensors(dense)["blk.1.attn_q.weight"])
    assert report.stand_ins == ("a narrow MLP of zeros in blocks 1, 3, because llama.cpp takes no block without one",)
    assert report.copied.tensors_replaced == 8


def test_zero_bytes_are_zeros_in_every_type_that_can_be_read():
    read = 0
    for kind, (block, nbytes) in gguf.GGML_QUANT_SIZES.items():
        assert 256 % block == 0
        try:
            values = gguf.quants.dequantize(np.zeros((1, 256 // block * nbytes), np.uint8), kind)
        except NotImplementedError:  # integers, and types that only llama.cpp reads
            continue
        assert not values.any()
        read += 1
    assert read >= 20


def test_rotary_tables_and_biases_are_carried_over(tmp_path):
    def edit(tensors):
        tensors["rope_freqs.weight"] = np.linspace(1, 2, 8, dtype=np.float32)
        for block in range(4):
            tensors[f"blk.{block}.attn_output.bias"] = np.full(64, block, np.float32)
            tensors[f"blk.{block}.ffn_down.bias"] = np.full(64, -block, np.float32)

    dense, pruned, _ = make(tmp_path, "attn=1,block=2,mlp=3", edit=edit)
    old, new = tensors(dense), tensors(pruned)
    assert same(new["rope_freqs.weight"], old["rope_freqs.weight"])
    assert "blk.1.attn_output.bias" not in new and same(new["blk.1.ffn_down.bias"], old["blk.1.ffn_down.bias"])
    assert same(new["blk.2.attn_output.bias"], old["blk.3.attn_output.bias"]) and "blk.2.ffn_down.bias" not in new


def repaired(tmp_path, family, spec, kind, tensors, mapped=()):
    model = tiny_model(family, blocks=4)
    dense = write_gguf(tmp_path / "dense.gguf", model, KINDS[kind])
    surgery = replace(surgery_of(model, spec, mapped), tensors=tensors)
    report = prune_gguf(dense, tmp_path / "pruned.gguf", surgery, verify="all")
    return gguf.GGUFReader(tmp_path / "pruned.gguf"), report


@pytest.mark.parametrize(("kind", "stored"), [("F32", "F32"), ("F16", "F16"), ("BF16", "BF16"), ("Q4_1", "F16")])
def test_repaired_tensors_take_the_place_of_the_dense_ones(tmp_path, kind, stored):
    matrix, norm = torch.randn(64, 96).bfloat16().half().float(), torch.randn(64)
    new, report = repaired(tmp_path, "llama", "block=0,attn=2", kind, {
        "model.layers.1.mlp.down_proj.weight": matrix,  # of the original block 2
        "model.layers.0.input_layernorm.weight": norm,
    })  # fmt: skip
    found = tensors(new)
    assert found["blk.1.ffn_down.weight"].tensor_type == KINDS[stored]
    read = gguf.quants.dequantize(found["blk.1.ffn_down.weight"].data, KINDS[stored])
    assert np.array_equal(read, matrix.numpy())
    assert np.array_equal(found["blk.0.attn_norm.weight"].data, norm.numpy())
    assert report.copied.tensors_replaced == 2 and report.copied.bytes_overwritten > 0


@pytest.mark.parametrize(("family", "spec", "turned"), [
    ("llama", "attn=2", True), ("llama", "block=2", True), ("qwen2", "attn=2", True), ("qwen2", "block=2", False),
])  # fmt: skip
def test_repaired_queries_and_keys_take_the_order_of_the_file(tmp_path, family, spec, turned):
    query, key = torch.randn(64, 64), torch.randn(32, 64)
    names = {"model.layers.1.self_attn.q_proj.weight": query, "model.layers.1.self_attn.k_proj.weight": key}
    found = tensors(repaired(tmp_path, family, spec, "F32", names)[0])
    order = [head * 16 + j + part for head in range(4) for j in range(8) for part in (0, 8)]
    for name, wanted in (("q", query), ("k", key)):
        rows = order[: len(wanted)] if turned else range(len(wanted))
        assert np.array_equal(found[f"blk.1.attn_{name}.weight"].data, wanted[list(rows)].numpy())


def test_a_matrix_beyond_the_range_of_16_bits_stays_in_32(tmp_path):
    matrix = torch.randn(64, 96) * 1e6
    found = tensors(repaired(tmp_path, "llama", "attn=2", "Q8_0", {"model.layers.1.mlp.down_proj.weight": matrix})[0])
    assert np.array_equal(found["blk.1.ffn_down.weight"].data, matrix.numpy())


def test_a_linear_map_becomes_a_block_whose_mlp_is_its_bias(tmp_path):
    weight, bias = torch.randn(64, 64), torch.randn(64)
    names = {"model.layers.2.self_attn.weight": weight, "model.layers.2.self_attn.bias": bias}
    new, _ = repaired(tmp_path, "llama", "attn=2", "F32", names, [Layer("attn", 2)])
    found = tensors(new)
    assert value(new, "deci.attention.head_count") == [4, 4, 4, 0, 4]
    assert value(new, "deci.attention.head_count_kv") == [2, 2, 0, 0, 2]
    assert value(new, "deci.feed_forward_length") == [96, 96, 256, 96, 96]
    assert np.array_equal(found["blk.2.attn_output.weight"].data, weight.numpy())
    assert np.array_equal(found["blk.2.ffn_down.bias"].data, bias.numpy())
    dense = tensors(gguf.GGUFReader(tmp_path / "dense.gguf"))
    assert same(found["blk.2.attn_norm.weight"], dense["blk.2.attn_norm.weight"])
    assert same(found["blk.3.ffn_up.weight"], dense["blk.2.ffn_up.weight"]) and "blk.3.attn_norm.weight" not in found
    assert same(found["blk.4.attn_q.weight"], dense["blk.3.attn_q.weight"])


def refuse(tmp_path, words, error=CheckpointError, *, spec="attn=1", tensors=None, **written):
    """That a dense file is refused in one line with `words`, and nothing appears."""
    model = tiny_model("llama")
    dense = write_gguf(tmp_path / "dense.gguf", model, **written)
    surgery = replace(surgery_of(model, spec), tensors=tensors or {})
    with pytest.raises(error, match=words) as caught:
        prune_gguf(dense, tmp_path / "pruned.gguf", surgery)
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == ["dense.gguf"]


def test_one_of_several_files_is_refused(tmp_path):
    refuse(tmp_path, "one of several files", describe=lambda writer: writer.add_uint16("split.count", 2))


def test_a_tensor_that_deci_has_no_place_for_is_refused(tmp_path):
    def add(tensors):
        tensors["blk.0.attn_q_norm.weight"] = np.ones(16, np.float32)

    refuse(tmp_path, "attn_q_norm.*no place.*another format", edit=add)


def test_a_missing_tensor_or_a_wrong_shape_is_refused(tmp_path):
    refuse(tmp_path, "lacks blk.1.ffn_up", edit=lambda tensors: tensors.pop("blk.1.ffn_up.weight"))
    (tmp_path / "dense.gguf").unlink()

    def widen(tensors):
        tensors["blk.1.attn_k.weight"] = np.ones((64, 64), np.float32)

    refuse(tmp_path, "attn_k.weight has the shape", edit=widen)


def test_keys_that_are_no_dense_models_are_refused(tmp_path):
    for key, wrong in (("attention.head_count", [4, 4]), ("feed_forward_length", 0), ("block_count", 1 << 31)):
        vtype = gguf.GGUFValueType.ARRAY if isinstance(wrong, list) else gguf.GGUFValueType.UINT32
        refuse(tmp_path, "not a positive|each block|fewer tensors",
               describe=lambda w, k=key, v=wrong, t=vtype: w.add_key_value(f"llama.{k}", v, t))  # fmt: skip
        (tmp_path / "dense.gguf").unlink()
    refuse(tmp_path, "unequal or odd", describe=lambda writer: writer.add_rope_dimension_count(8))


@pytest.mark.parametrize(
    "key, value",
    [
        ("llama.attention.sliding_window_pattern", [True, False, True, False]),
        ("llama.full_attention_layers", [1, 3]),
        ("quantize.bits_by_block", [4, 4, 8, 8]),
    ],
)
def test_an_array_by_block_that_is_not_known_is_refused_by_name(tmp_path, key, value):
    with pytest.raises(CheckpointError, match=f"{key} has an entry for each block"):
        make(tmp_path, "block=1", describe=lambda writer: writer.add_array(key, value))


def test_a_repaired_parameter_that_the_file_cannot_hold_is_refused(tmp_path):
    refuse(tmp_path, "no place for it", tensors={"model.layers.1.self_attn.o_proj.weight": torch.ones(64, 64)})
    (tmp_path / "dense.gguf").unlink()
    refuse(tmp_path, "has no output.weight", tensors={"lm_head.weight": torch.ones(267, 64)})


def test_another_architecture_is_refused(tmp_path):
    model = tiny_model("llama")
    dense = write_gguf(tmp_path / "dense.gguf", model)
    dense.write_bytes(dense.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(CheckpointError, match="gemma; a GGUF is written from llama, qwen2, "):
        prune_gguf(dense, tmp_path / "pruned.gguf", surgery_of(model, "attn=1"))
    assert listing(tmp_path) == ["dense.gguf"]


def test_a_plan_for_another_model_is_refused(tmp_path):
    dense = write_gguf(tmp_path / "dense.gguf", tiny_model("llama"))
    with pytest.raises(PlanError, match=r"\[4\] blocks, but dense.gguf has one of 2"):
        prune_gguf(dense, tmp_path / "pruned.gguf", surgery_of(tiny_model("llama", blocks=4), "attn=1"))


def test_a_damaged_file_is_refused(tmp_path):
    model = tiny_model("llama")
    surgery = surgery_of(model, "attn=1")
    whole = write_gguf(tmp_path / "dense.gguf", model).read_bytes()
    for content in (b"", b"GGUF", whole[:3000], whole[:-5000], b"PK\x03\x04" + whole):
        (tmp_path / "dense.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged|cut short|no GGUF"):
            prune_gguf(tmp_path / "dense.gguf", tmp_path / "pruned.gguf", surgery)
    assert listing(tmp_path) == ["dense.gguf"]


def test_what_exists_is_never_touched(tmp_path):
    model = tiny_model("llama")
    dense = write_gguf(tmp_path / "dense.gguf", model)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "folder", "link", "file/below"):
        with pytest.raises(OutputError) as caught:
            prune_gguf(dense, tmp_path / name, surgery_of(model, "attn=1"))
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert listing(tmp_path) == ["dense.gguf", "file", "folder", "link"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_copy_that_differs_is_not_kept(tmp_path, monkeypatch, family):
    model = tiny_model(family)
    dense = write_gguf(tmp_path / "dense.gguf", model)
    ftruncate = os.ftruncate

    def spoil(file, size):  # the last thing done before the copy is read back
        ftruncate(file, size)
        os.pwrite(file, b"\xff", size // 2)

    monkeypatch.setattr(os, "ftruncate", spoil)
    with pytest.raises(VerificationError, match="differs"):
        prune_gguf(dense, tmp_path / "pruned.gguf", surgery_of(model, "attn=1"), verify="all")
    assert listing(tmp_path) == ["dense.gguf"]


KILLED = """
import sys
from pathlib import Path
from dropformer.prune.formats.gguf.write import write_gguf
from types import SimpleNamespace
from dropformer.prune.block_map import BlockMap, MappedBlock
from dropformer.prune.outline import Outline
outline = Outline.model_validate_json(sys.argv[2])
block_map = BlockMap({"": (MappedBlock(0, 0), MappedBlock(1, 1, ("attn",)))})
def stop(done, total):
    print("writing", flush=True)
    sys.stdin.read()
folder, surgery = Path(sys.argv[1]), SimpleNamespace(outline=outline, block_map=block_map, tensors={})
write_gguf(folder / "dense.gguf", folder / "pruned.gguf", surgery, progress=stop)
"""


def test_a_killed_run_leaves_no_file_and_the_next_one_takes_its_rest_away(tmp_path):
    model = tiny_model("llama")
    dense = write_gguf(tmp_path / "dense.gguf", model)
    surgery = surgery_of(model, "attn=1")
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    run = subprocess.Popen([*command, surgery.outline.model_dump_json()], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout.readline() == b"writing\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    left = [name for name in listing(tmp_path) if name != "dense.gguf"]
    assert len(left) == 1 and left[0].startswith(".dropformer-")
    prune_gguf(dense, tmp_path / "pruned.gguf", surgery)
    assert listing(tmp_path) == ["dense.gguf", "pruned.gguf"]


def test_progress_tells_the_bytes_of_the_new_file(tmp_path):
    told = []
    _, pruned, _ = make(tmp_path, "attn=0", family="qwen2", progress=lambda done, total: told.append((done, total)))
    total = sum(t.n_bytes for t in pruned.tensors)
    assert told[-1] == (total, total) and {entry[1] for entry in told} == {total}
    assert [entry[0] for entry in told] == sorted({entry[0] for entry in told})


def test_rows_interleave_within_each_head():
    assert interleaved(bytes(range(16)), 2, 4) == bytes([0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15])
