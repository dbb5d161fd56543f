"""The format `deci`: what engines are told is what was cut, and what they cannot carry is refused with a reason."""

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from dropformer.prune.architecture import Layer
from dropformer.prune.errors import ArchitectureError, CheckpointError, PlanError
from dropformer.prune.formats.deci import deci_config, deci_notes, engine_width
from dropformer.prune.loading.deci.configuration_decilm import DeciLMConfig, Entry
from dropformer.prune.loading.deci.load import dropformer_config, load_deci

FAMILIES = {"llama": {}, "mistral": {"sliding_window": 5}, "qwen2": {}}
SPECS = ["attn=1,3", "mlp=0,2", "attn=1,3,mlp=3", "attn=1,mlp=2"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.fixture
def surgery(llama_folder, pruned_in_memory):
    return lambda spec: pruned_in_memory(llama_folder, spec).dropformer.surgery


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_alone_gives_the_pruned_models_logits(lively, write_deci, tmp_path, ids, family, spec):
    pruned = write_deci(lively(tmp_path / "dense", family, **FAMILIES[family]), spec, tmp_path / "out")
    torch.testing.assert_close(load_deci(tmp_path / "out")(ids).logits, pruned(ids).logits, rtol=0, atol=0)


def test_block_configs_say_what_each_remaining_block_lacks(surgery, llama_folder):
    fields = deci_config(config_of(llama_folder), surgery("attn=1,3,mlp=2,3"))
    lacks = [(b["attention"]["no_op"], b["ffn"]["no_op"]) for b in fields["block_configs"]]
    assert lacks == [(False, False), (True, False), (False, True)]
    assert fields["num_hidden_layers"] == 3
    assert [b["attention"]["n_heads_in_group"] for b in fields["block_configs"]] == [2, None, 2]
    assert (fields["architectures"], fields["model_type"]) == (["DeciLMForCausalLM"], "nemotron-nas")


def test_tensors_are_llamas_without_the_dropped_branches_and_their_norms(lively, write_deci, tmp_path):
    source = lively(tmp_path / "dense", "llama")
    write_deci(source, "attn=1,mlp=2", tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    gone = ("layers.1.self_attn", "layers.1.input_layernorm", "layers.2.mlp", "layers.2.post_attention_layernorm")
    assert after.keys() == {name for name in before if not any(part in name for part in gone)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_qwen2_gets_the_zero_bias_that_it_lacks_in_every_attention_that_stays(lively, write_deci, tmp_path):
    write_deci(lively(tmp_path / "dense", "qwen2"), "attn=1", tmp_path / "out")
    biases = {name: t for name, t in tensors_of(tmp_path / "out").items() if name.endswith("o_proj.bias")}
    assert sorted(biases) == [f"model.layers.{i}.self_attn.o_proj.bias" for i in (0, 2, 3)]
    assert all(t.shape == (32,) and not t.any() for t in biases.values())
    assert config_of(tmp_path / "out")["attention_bias"] is True


def test_a_bias_that_is_not_zero_is_not_taken_for_qwen2(lively, write_deci, tmp_path):
    write_deci(lively(tmp_path / "dense", "qwen2"), "attn=1", tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    tensors["model.layers.2.self_attn.o_proj.bias"][3] = 0.5
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected.*layers\.2\.self_attn\.o_proj\.bias"):
        load_deci(tmp_path / "out")


def test_a_head_that_the_files_hold_is_never_tied(lively, write_deci, tmp_path, ids):
    source = lively(tmp_path / "dense", "llama", tie_word_embeddings=True)
    tensors = tensors_of(source)
    save_file(tensors | {"lm_head.weight": torch.randn(64, 32)}, source / "model.safetensors", {"format": "pt"})
    pruned = write_deci(source, "attn=1", tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    torch.testing.assert_close(load_deci(tmp_path / "out")(ids).logits, pruned(ids).logits, rtol=0, atol=0)


def test_a_bare_trunks_tensors_get_the_prefix_that_engines_expect(lively, write_deci, tmp_path, ids):
    source = lively(tmp_path / "dense", "llama", tie_word_embeddings=True)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors_of(source).items()}
    save_file(bare, source / "model.safetensors", {"format": "pt"})
    pruned = write_deci(source, "attn=1", tmp_path / "out")
    assert all(name.startswith("model.") for name in tensors_of(tmp_path / "out"))
    torch.testing.assert_close(load_deci(tmp_path / "out")(ids).logits, pruned(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 5e5}, LLAMA3])
def test_rotary_settings_are_written_for_transformers_5_and_4(lively, write_deci, tmp_path, ids, rope):
    source = lively(tmp_path / "dense", "llama", rope_parameters=rope, max_position_embeddings=128)
    pruned = write_deci(source, "attn=1", tmp_path / "out")
    fields = config_of(tmp_path / "out")
    assert fields["rope_parameters"] == rope
    assert fields["rope_theta"] == 5e5
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert fields.get("rope_scaling", {"rope_type": "default"}) == old
    assert DeciLMConfig(**fields).rope_parameters == rope
    torch.testing.assert_close(load_deci(tmp_path / "out")(ids).logits, pruned(ids).logits, rtol=0, atol=0)


def test_settings_that_the_file_leaves_to_transformers_are_written_out(surgery, llama_folder):
    bare = {key: value for key, value in config_of(llama_folder).items() if key not in ("head_dim", "rms_norm_eps")}
    bare = {key: value for key, value in bare.items() if key not in ("rope_parameters", "max_position_embeddings")}
    fields = deci_config(bare, surgery("attn=1"))
    assert (fields["head_dim"], fields["rms_norm_eps"], fields["max_position_embeddings"]) == (8, 1e-6, 2048)
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_the_dense_config_is_left_as_it_was(surgery, llama_folder):
    config = config_of(llama_folder)
    before = copy.deepcopy(config)
    deci_config(config, surgery("attn=1"))
    assert config == before


def test_each_block_keeps_its_own_window(lively, write_deci, tmp_path, ids):
    source = lively(tmp_path / "dense", "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    pruned = write_deci(source, "block=0,attn=2", tmp_path / "out")
    fields = config_of(tmp_path / "out")
    assert fields["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    torch.testing.assert_close(load_deci(tmp_path / "out")(ids).logits, pruned(ids).logits, rtol=0, atol=0)


def test_a_factor_for_the_mlps_width_is_written_only_where_engines_make_that_width_of_it(surgery, llama_folder):
    config, cut = config_of(llama_folder), surgery("attn=1")
    for width in (48, 255, 257, 512, 11008):
        ffn = deci_config(config | {"intermediate_size": width}, cut)["block_configs"][0]["ffn"]
        assert ffn["intermediate_size"] == width
        assert ("ffn_mult" in ffn) is (width % 256 == 0), width
        assert engine_width(ffn.get("ffn_mult", 1.5 * width / 32), 32) == -(-width // 256) * 256


@pytest.mark.parametrize(("hidden", "width"), [(576, 1536), (2048, 8192), (3584, 18944), (4096, 14336), (5120, 13824)])
def test_real_models_widths_survive_the_engines_arithmetic(hidden, width):
    assert engine_width(1.5 * width / hidden, hidden) == width


def test_notes_name_what_an_engine_cannot_do(surgery, llama_folder):
    config, cut = config_of(llama_folder), surgery("attn=1")
    assert deci_notes(deci_config(config | {"intermediate_size": 256}, cut)) == []
    assert "width is a multiple of 256, not 48" in deci_notes(deci_config(config, cut))[0]
    biased = config | {"intermediate_size": 256, "mlp_bias": True, "attention_bias": True}
    assert len(deci_notes(deci_config(biased, cut))) == 2
    window = deci_config(config | {"intermediate_size": 256, "model_type": "mistral", "sliding_window": 7,
                                   "architectures": None}, cut)  # fmt: skip
    assert "up to 7 tokens" in deci_notes(window)[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "qwen3"}, "norms its queries and keys"),
        ({"model_type": "gemma2"}, "llama, mistral, qwen2"),
        ({"model_type": "mixtral"}, "llama, mistral, qwen2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"per_layer_config": {"1": {"intermediate_size": 16}}}, "per_layer_config"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotary"),
    ],
)
def test_a_model_that_the_architecture_cannot_carry_is_refused(surgery, llama_folder, changes, reason):
    with pytest.raises(ArchitectureError, match=reason) as error:
        deci_config(config_of(llama_folder) | changes, surgery("attn=1"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("spec", "protect"), [("attn=0", 0), ("block=0,attn=1", 1)])
def test_a_first_block_without_attention_is_refused_with_the_way_out(surgery, llama_folder, spec, protect):
    with pytest.raises(PlanError, match=f"--keep {protect},"):
        deci_config(config_of(llama_folder), surgery(spec))


def test_the_first_attention_may_go_with_its_mlp(lively, write_deci, tmp_path, ids):
    pruned = write_deci(lively(tmp_path / "dense", "llama"), "block=0,attn=2", tmp_path / "out")
    torch.testing.assert_close(load_deci(tmp_path / "out")(ids).logits, pruned(ids).logits, rtol=0, atol=0)


def test_linear_maps_are_refused(surgery, llama_folder):
    cut = surgery("attn=1")
    mapped = {Layer("attn", 1): {"self_attn": {"linear": [32, 32], "of": ["zeros", None]}}}
    with pytest.raises(PlanError, match=r"attn:1 became linear maps"):
        deci_config(config_of(llama_folder), replace(cut, block_map=replace(cut.block_map, mapped=mapped)))


def test_another_ones_decilm_is_not_read_as_ours():
    with pytest.raises(CheckpointError, match="base_model_type"):
        dropformer_config({"model_type": "nemotron-nas", "block_configs": []})


def test_entries_answer_to_attributes_and_travel_as_json_and_pickle():
    entry = Entry(attention=Entry(no_op=True))
    assert entry.attention.no_op is True
    with pytest.raises(AttributeError):
        _ = entry.ffn
    assert not hasattr(entry.attention, "window_length")
    assert pickle.loads(pickle.dumps(entry)) == copy.deepcopy(entry) == json.loads(json.dumps(entry))


def test_the_config_object_survives_saving(lively, write_deci, tmp_path):
    write_deci(lively(tmp_path / "dense", "qwen2"), "attn=1", tmp_path / "out")
    DeciLMConfig.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    again = DeciLMConfig.from_pretrained(tmp_path / "again")
    assert again.block_configs == config_of(tmp_path / "out")["block_configs"]
    assert again.block_configs[1].attention.no_op is True
    assert again.attention_bias is True


def test_the_config_class_reads_the_rotary_settings_of_others_decilms():
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    block = {"attention": {"no_op": False, "n_heads_in_group": 8}, "ffn": {"no_op": False, "ffn_mult": 2.625}}
    config = DeciLMConfig(
        block_configs=[block],
        rope_theta=5e5,
        rope_scaling=scaling,
        max_position_embeddings=64,
        num_key_value_heads=None,
    )
    assert config.rope_parameters == LLAMA3
    assert config.block_configs[0].ffn.ffn_mult == 2.625
    assert not hasattr(config.block_configs[0].ffn, "intermediate_size")


READ = """
import sys
if sys.argv[2] == "plugin":
    from dropformer.prune.engines.vllm_plugin import register_configs
    assert "transformers" not in sys.modules and "torch" not in sys.modules
    register_configs(); register_configs()
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "trust")
assert ("dropformer" in sys.modules) is (sys.argv[2] == "plugin")
print([b.attention.no_op for b in config.block_configs], config.architectures[0])
"""


@pytest.mark.parametrize(("way", "status"), [("trust", 0), ("plugin", 0), ("neither", 1)])
def test_transformers_reads_the_config_by_remote_code_or_by_the_plugin_only(lively, write_deci, tmp_path, way, status):
    write_deci(lively(tmp_path / "dense", "llama"), "attn=1", tmp_path / "out")
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", READ, str(tmp_path / "out"), way]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == status, done.stderr
    want = "[False, True, False, False] DeciLMForCausalLM"
    assert (done.stdout.strip() == want) if status == 0 else ("trust_remote_code" in done.stderr)


def test_stock_transformers_has_no_model_for_it(lively, write_deci, tmp_path):
    from transformers import AutoModelForCausalLM

    write_deci(lively(tmp_path / "dense", "llama"), "attn=1", tmp_path / "out")
    with pytest.raises(ValueError, match=r"nemotron-nas|DeciLMConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).num_hidden_layers == 4
