"""An exported checkpoint holds the pruned model and nothing else, and no stock loader mistakes it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import dropformer
from dropformer import api
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import CheckpointError, OutputError, PlanError, VerificationError
from dropformer.prune.formats.export import reference
from dropformer.prune.loading.load import load

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "mixtral", "qwen3_moe", "falcon", "phi3"]


def opened(folder: Path) -> api.LoadedModel:
    return api.LoadedModel(load(folder), None, folder, reference(folder.name, folder), None)


def drop_and_save(source: Path, spec: str, out: Path):
    dense = opened(source)
    plan = api.plan_unscored(dense.ref, api.outline(dense.model), spec, (), None)
    pruned = api.drop(dense, plan)
    return dense, pruned, api.save(pruned, out)


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {name: t.view(torch.uint8).numpy().tobytes() for name, t in load_file(path).items()}
    return found


@pytest.fixture
def folder(tiny, tmp_path):
    def make(family: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
        tiny(family, **changes).to(dtype).save_pretrained(tmp_path / family, max_shard_size="200KB")
        return tmp_path / family

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", ["attn=0,2", "mlp=1", "block=1"])
def test_every_way_of_loading_gives_the_pruned_model(folder, tmp_path, ids, family, spec):
    _, pruned, exported = drop_and_save(folder(family), spec, tmp_path / "out")
    want = pruned(ids).logits
    for model in (dropformer.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()):
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=0)
    native = type(dropformer.load(folder(family)))
    assert isinstance(model, native)
    assert exported.max_difference == 0


def test_the_files_lose_exactly_the_dropped_tensors_and_keep_the_others_byte_for_byte(folder, tmp_path):
    source = folder("llama", torch.bfloat16)
    drop_and_save(source, "attn=1", tmp_path / "out")
    before, after = tensor_bytes(source), tensor_bytes(tmp_path / "out")
    gone = {n for n in before if n.startswith(("model.layers.1.self_attn.", "model.layers.1.input_layernorm."))}
    assert after == {name: data for name, data in before.items() if name not in gone}
    assert len(gone) == 5


def test_packed_blocks_are_renumbered_and_keep_their_bytes(folder, tmp_path):
    source = folder("llama")
    drop_and_save(source, "mlp=1,attn=2", tmp_path / "out")
    before, after = tensor_bytes(source), tensor_bytes(tmp_path / "out")
    assert after["model.layers.1.self_attn.q_proj.weight"] == before["model.layers.1.self_attn.q_proj.weight"]
    assert after["model.layers.1.mlp.up_proj.weight"] == before["model.layers.2.mlp.up_proj.weight"]
    assert after["model.layers.2.mlp.up_proj.weight"] == before["model.layers.3.mlp.up_proj.weight"]
    record = json.loads((tmp_path / "out" / "dropformer.json").read_text())
    assert record["original_blocks"] == {"0": 0, "1": {"attention": 1, "mlp": 2}, "2": 3}


def test_a_packed_checkpoint_needs_no_dropformer(folder, tmp_path):
    drop_and_save(folder("llama"), "block=1", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 3)
    assert "auto_map" not in config


def test_the_config_never_bears_the_base_model_type(folder, tmp_path):
    drop_and_save(folder("llama"), "attn=0,2", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "dropformer"
    assert config["per_layer_config"] == {"0": {"skip": ["attention"]}, "2": {"skip": ["attention"]}}


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
path, trust = sys.argv[1], sys.argv[2] == "trust"
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust).eval()
assert "dropformer" not in sys.modules
modules = (name.split(".") for name in sys.modules if name.startswith("transformers.models."))
families = {name[2] for name in modules if name[-1].startswith("modeling_")}
assert families <= {"auto", "llama", "mixtral"}, families  # an import of every family takes seconds
ids = torch.arange(3, 15)[None]
print("LOGITS", float(model(ids).logits.double().sum()), torch.equal(
    model.generate(ids, max_new_tokens=5, do_sample=False),
    model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)))
"""


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_without_dropformer_remote_code_loads_it_and_plain_transformers_says_what_to_do(
    folder, tmp_path, elsewhere, family
):
    _, pruned, _ = drop_and_save(folder(family), "attn=0,2", tmp_path / "out")
    trusted = elsewhere(PLAIN, tmp_path / "out", "trust")
    assert trusted.returncode == 0, trusted.stderr
    total, same = trusted.stdout.split()[-2:]
    want = float(pruned(torch.arange(3, 15)[None]).logits.double().sum())
    assert float(total) == pytest.approx(want, abs=1e-4)
    assert same == "True"
    refused = elsewhere(PLAIN, tmp_path / "out", "no")
    assert refused.returncode != 0
    assert "trust_remote_code" in refused.stderr


def test_the_trunk_loads_alone(folder, tmp_path, ids):
    _, pruned, _ = drop_and_save(folder("llama"), "attn=0", tmp_path / "out")
    trunk = AutoModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(trunk(ids)[0], pruned.model(ids)[0])


def test_saving_a_loaded_pruned_model_again_gives_the_same_model(folder, tmp_path, ids):
    drop_and_save(folder("gemma2"), "attn=0,2,mlp=1", tmp_path / "out")
    model = dropformer.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert AutoConfig.from_pretrained(tmp_path / "again").per_layer_config is not None


def test_a_model_that_was_only_ever_in_memory_is_saved_too(tiny, tmp_path, ids):
    model = tiny("llama")
    plan = api.plan_unscored(ModelRef(name="mine"), api.outline(model), "attn=1", (), None)
    pruned = api.drop(model, plan)
    api.save(pruned, tmp_path / "out")
    torch.testing.assert_close(dropformer.load(tmp_path / "out")(ids).logits, pruned(ids).logits, rtol=0, atol=0)


def test_dropping_leaves_the_dense_model_as_it_was_and_shares_its_weights(tiny, ids):
    model = tiny("llama")
    want = model(ids).logits
    plan = api.plan_unscored(ModelRef(name="mine"), api.outline(model), "attn=1,block=2", (), None)
    pruned = api.drop(model, plan)
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=0)
    assert pruned.model.embed_tokens.weight is model.model.embed_tokens.weight


def test_a_written_checkpoint_that_differs_is_not_kept(folder, tmp_path):
    dense = opened(folder("llama"))
    pruned = api.drop(dense, api.plan_unscored(dense.ref, api.outline(dense.model), "attn=1", (), None))
    with torch.no_grad():
        pruned.model.layers[3].mlp.down_proj.weight.mul_(2)
    with pytest.raises(VerificationError, match="nothing was kept"):
        api.save(pruned, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


def test_a_checkpoint_with_a_missing_tensor_does_not_load(folder, tmp_path):
    drop_and_save(folder("llama"), "attn=1", tmp_path / "out")
    shard = next((tmp_path / "out").glob("*.safetensors"))
    with safe_open(shard, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors.pop(next(name for name in tensors if "layers" in name))
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError):
        dropformer.load(tmp_path / "out")


def test_a_plan_for_other_weights_is_refused(folder, tmp_path):
    dense = opened(folder("llama"))
    plan = api.plan_unscored(dense.ref, api.outline(dense.model), "attn=1", (), None)
    other = opened(folder("qwen2"))
    with pytest.raises(PlanError, match="other weights"):
        api.drop(other, plan)


def test_an_output_that_holds_something_is_left_alone(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="not empty"):
        drop_and_save(folder("llama"), "attn=1", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
