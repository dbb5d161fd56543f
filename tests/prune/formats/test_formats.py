"""Each format holds the pruned model: dense as zeros that load anywhere, ONNX as a graph with its cache."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dropformer
from dropformer import api
from dropformer.metrics.repair.base import Repair
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import OutputError, PlanError
from dropformer.prune.formats.export import reference
from dropformer.prune.loading.load import load


@pytest.fixture
def opened(tiny, tmp_path):
    def make(family, **changes):
        folder = tmp_path / family
        tiny(family, **changes).save_pretrained(folder)
        return api.LoadedModel(load(folder), None, folder, reference(family, folder), None)

    return make


def pruned_of(opened, spec, repair=None):
    return api.drop(opened, api.plan_unscored(opened.ref, api.outline(opened.model), spec, (), None), repair)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "mixtral", "falcon", "mamba"])
def test_zeros_load_anywhere_and_give_the_pruned_models_logits(opened, tmp_path, elsewhere, family):
    dense = opened(family)
    spec = "attn=0,2" if family == "mamba" else "attn=0,2,mlp=2"
    pruned = pruned_of(dense, spec)
    done = dropformer.save(pruned, tmp_path / "out", "dense")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1]);"
        "print(float(m(torch.arange(3, 15)[None]).logits.double().sum().detach()));"
        "assert 'dropformer' not in sys.modules"
    )
    said = elsewhere(script, tmp_path / "out").stdout
    want = float(pruned(torch.arange(3, 15)[None]).logits.double().sum().detach())
    assert float(said) == pytest.approx(want, rel=1e-5, abs=1e-5)
    assert done.record["after"] == done.record["before"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family


def test_only_what_writes_to_the_stream_is_zero(opened, tmp_path):
    dense = opened("llama", attention_bias=True)
    dropformer.save(pruned_of(dense, "attn=1,block=2"), tmp_path / "out", "dense")
    before = load_file(dense.path / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    gone = {n for n in before if "layers.1.self_attn.o_proj" in n or "layers.2.self_attn.o_proj" in n}
    gone.add("model.layers.2.mlp.down_proj.weight")
    assert len(gone) == 5
    for name, tensor in after.items():
        assert torch.equal(tensor, torch.zeros_like(tensor) if name in gone else before[name])


def test_repaired_weights_are_in_the_dense_format_too(opened, tmp_path, ids):
    dense = opened("llama")
    name = "model.layers.3.mlp.down_proj.weight"
    repair = Repair({name: dense.model.get_parameter(name).detach() * 0.5})
    pruned = pruned_of(dense, "attn=2,block=1", repair)
    done = dropformer.save(pruned, tmp_path / "out", "dense")
    assert done.max_difference < 1e-5
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(stock(ids).logits, pruned(ids).logits)
    assert torch.equal(stock.get_parameter(name), repair.tensors[name])


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize("kind", ["dropformer", "dense"])
@pytest.mark.parametrize(("family", "fields"), [("mixtral", {}), ("qwen3_moe", EXPERTS)])
def test_repaired_experts_are_written_as_the_files_hold_them(opened, tmp_path, ids, family, fields, kind):
    dense = opened(family, **fields)
    experts = "model.layers.3.mlp.experts"
    names = [f"{experts}.gate_up_proj", f"{experts}.down_proj", "model.layers.3.mlp.gate.weight"]
    repair = Repair({name: dense.model.get_parameter(name).detach() * 0.5 for name in names})
    pruned = pruned_of(dense, "attn=2" if kind == "dense" else "attn=2,block=1", repair)
    moved = names if kind == "dense" else [name.replace("layers.3", "layers.2") for name in names]
    done = dropformer.save(pruned, tmp_path / "out", kind)
    assert done.max_difference < 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (dense.path, tmp_path / "out"))
    assert all(name in before for name in after) and not any("gate_up" in name for name in after)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(read(ids).logits, pruned(ids).logits)
    for old, name in zip(names, moved, strict=True):
        assert torch.equal(read.get_parameter(name), repair.tensors[old])


def test_what_zeros_cannot_say_is_refused(opened, tmp_path):
    dense = opened("llama")
    forms = {"self_attn": {"linear": [32, 32], "of": ["zeros", None]}}
    tensors = {f"model.layers.2.self_attn.{n}": torch.zeros(s) for n, s in (("weight", (32, 32)), ("bias", (32,)))}
    mapped = pruned_of(dense, "attn=2", Repair(tensors, {Layer("attn", 2): forms}))
    with pytest.raises(PlanError, match="no place for linear maps"):
        dropformer.save(mapped, tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_names_those_there_are(opened, tmp_path):
    with pytest.raises(OutputError, match="expected one of dropformer, dense"):
        dropformer.save(pruned_of(opened("llama"), "attn=2"), tmp_path / "out", "pickle")


def test_the_auto_map_names_classes_that_the_carried_code_offers(opened, tmp_path):
    from dropformer.prune.loading import modeling

    dropformer.save(pruned_of(opened("llama"), "attn=2"), tmp_path / "out")
    named = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= named.keys()
    assert all(hasattr(modeling, value.partition(".")[2]) for value in named.values())


@pytest.mark.engine
@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs onnx, onnxscript and onnxruntime")
@pytest.mark.parametrize(("family", "spec"), [("llama", "attn=0,2"), ("qwen3", "attn=1,mlp=2"), ("gemma2", "block=1")])
def test_onnx_runtime_gives_the_pruned_models_logits_with_its_cache(opened, tmp_path, family, spec):
    from dropformer.prune.formats.onnx import compare

    pruned = pruned_of(opened(family), spec)
    done = dropformer.save(pruned, tmp_path / "out", "onnx")
    assert compare(pruned, tmp_path / "out" / "model.onnx") < 1e-4
    assert (tmp_path / "out" / "model.onnx").is_file() and done.record["format"] == "onnx"


def test_a_model_that_is_saved_again_carries_all_the_code_that_loads_it(opened, tmp_path):
    dense = opened("llama")
    api.save(
        api.drop(dense, api.plan_unscored(dense.ref, api.outline(dense.model), "attn=1", (), None)), tmp_path / "a"
    )
    first = {path.name for path in (tmp_path / "a").glob("*.py")}
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {path.name for path in (tmp_path / "b").glob("*.py")} == first
    assert config["auto_map"] == json.loads((tmp_path / "a" / "config.json").read_text())["auto_map"]
