"""`prune engines`: what the files of a checkpoint say about the engines that load it."""

import json

import pytest
from command import run

from dropformer.prune.engines.facts import CheckpointFacts
from dropformer.prune.engines.registry import ENGINES, Answer, Engine, engines
from dropformer.prune.errors import CheckpointError
from dropformer.prune.registry import imported


def loads(folder, name: str) -> bool:
    return engines(folder)["engines"][name]["loads"]


@pytest.fixture
def pruned(lively, pruned_in_memory, tmp_path):
    """Writes a pruned checkpoint of a family in a format."""
    import dropformer

    def make(family: str, spec: str, format: str = "dropformer", **changes):
        folder = tmp_path / f"{family}-{spec}-{format}"
        dropformer.save(pruned_in_memory(lively(tmp_path / f"{family}-dense", family, **changes), spec), folder, format)
        return folder

    return make


def test_the_default_format_loads_in_transformers_and_in_vllm_with_the_plugin_alone(pruned):
    folder = pruned("llama", "attn=1")
    found = engines(folder)
    able = {name for name, entry in found["engines"].items() if entry["loads"]}
    assert found["format"] == "dropformer"
    assert {"transformers", "vllm-plugin"} <= able
    assert not able & {"vllm", "sglang", "tensorrt-llm", "llama.cpp", "onnxruntime"}


@pytest.mark.parametrize(("window", "able"), [("5", True), ("5+2", False)])
def test_the_plugin_of_vllm_takes_windows_whose_first_tokens_are_not_kept(pruned, window, able):
    found = engines(pruned("llama", f"attn=3,window=1@{window}"))["engines"]["vllm-plugin"]
    assert found["loads"] is able and ("first tokens" in found["why"]) is not able


@pytest.mark.parametrize(
    ("family", "spec", "able"),
    [
        ("qwen3", "window=0,1,2,3@5", True),
        ("qwen3", "window=1@5", False),
        ("llama", "window=1@5", True),
        ("smollm3", "window=1@5", True),
    ],
)
def test_vllm_takes_a_stock_qwen_with_windows_in_every_layer_or_none(pruned, family, spec, able):
    found = engines(pruned(family, spec))["engines"]
    assert found["vllm"]["loads"] is found["vllm-plugin"]["loads"] is able
    assert able or "in every layer or in none" in found["vllm"]["why"]


def test_a_gguf_file_that_was_converted_into_a_checkpoints_folder_does_not_hide_the_checkpoint(pruned):
    folder = pruned("llama", "attn=1")
    (folder / "converted.gguf").write_bytes(b"GGUF")
    assert engines(folder)["format"] == "dropformer"


def test_formats_that_lack_layers_alone_are_no_way_out_for_windows(pruned):
    for entry in engines(pruned("llama", "attn=3,window=1@5+2"))["engines"].values():
        assert not any(word in entry["instead"] for word in ("deci", "dense", "gguf", "onnx", "pip install")), entry


def test_a_linear_map_has_no_way_out_but_transformers(tmp_path):
    facts = CheckpointFacts(tmp_path, "dropformer", "llama", "DropformerLlamaForCausalLM", maps=True)
    found = [imported(ENGINES[name].answer)(facts) for name in ("vllm-plugin", "llama.cpp", "sglang")]
    assert {(one.loads, one.instead) for one in found} == {(False, "load it in transformers")}


@pytest.mark.parametrize(
    ("config", "able"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, {"vllm", "llama.cpp", "tensorrt-llm", "mlx"}),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, {"vllm", "llama.cpp"}),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 16}, set()),
    ],
)
def test_engines_that_write_text_are_not_offered_to_models_that_do_not(tmp_path, config, able):
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = ("vllm", "llama.cpp", "tensorrt-llm", "mlx")
    assert {name for name in names if loads(tmp_path, name)} == able and loads(tmp_path, "transformers")


def test_what_windows_save_is_said_of_a_context(pruned):
    found = engines(pruned("llama", "window=1,2@5+2"))
    assert "KV cache at 8,192 tokens -" in found["saves"]


def test_every_engine_that_does_not_load_it_has_a_reason_and_a_way_out(pruned):
    for entry in engines(pruned("qwen3", "attn=1"))["engines"].values():
        assert entry["command"] if entry["loads"] else entry["why"] and entry["instead"], entry


def test_a_deci_checkpoint_loads_in_vllm_and_where_its_widths_fit_in_sglang(pruned):
    assert loads(pruned("llama", "attn=1", "deci", intermediate_size=256), "vllm")
    assert loads(pruned("llama", "attn=2", "deci", intermediate_size=256), "sglang")
    assert not loads(pruned("llama", "attn=3", "deci", intermediate_size=80), "sglang")


def test_tensorrt_llm_is_refused_attention_biases_and_sglang_is_not(pruned):
    folder = pruned("qwen2", "attn=1", "deci", intermediate_size=256)
    assert loads(folder, "sglang")
    assert not loads(folder, "tensorrt-llm")


@pytest.mark.parametrize(
    ("family", "spec", "offered"), [("llama", "attn=1", True), ("llama", "attn=0", False), ("qwen3", "mlp=1", False)]
)
def test_deci_is_offered_only_to_families_and_plans_that_it_carries(pruned, family, spec, offered):
    assert ("deci" in engines(pruned(family, spec))["engines"]["sglang"]["instead"]) is offered


@pytest.mark.parametrize(("spec", "format", "saves"), [("block=1", "dropformer", True), ("attn=1", "dense", False)])
def test_a_packed_and_a_zero_filled_checkpoint_are_stock_models(pruned, spec, format, saves):
    found = engines(pruned("llama", spec, format))
    assert found["format"] in ("stock", "dense")
    assert found["engines"]["sglang"]["loads"]
    assert ("nothing" not in found["saves"]) is saves


def test_savings_are_those_of_the_record(pruned):
    assert "KV cache -25.0%" in engines(pruned("llama", "attn=1"))["saves"]


def test_an_engine_is_one_entry(pruned):
    def answer(facts):
        return Answer(facts.family == "llama", f"run {facts.path}")

    with ENGINES.having("mine", Engine("Mine", answer)):
        assert loads(pruned("llama", "attn=1"), "mine")


def test_the_command_prints_json_and_a_table(pruned, capsys):
    folder = pruned("llama", "attn=1")
    status, printed, _ = run("engines", folder, "--json", capsys=capsys)
    assert status == 0 and json.loads(printed)["engines"]["vllm-plugin"]["loads"]
    assert "dropformer installed" in run("engines", folder, capsys=capsys)[1]


@pytest.mark.parametrize(
    ("format", "engine", "needs"),
    [
        *((format, "transformers", "torch") for format in ("dropformer", "deci", "dense")),
        ("onnx", "onnxruntime", "onnxruntime"),
    ],
)
def test_the_commands_in_python_run_as_they_are_printed(pruned, capsys, format, engine, needs):
    pytest.importorskip(needs)
    folder = pruned("llama", "attn=1", format)
    answer = engines(folder)["engines"][engine]
    exec(answer["command"], {})
    lines = run("engines", folder, "--full", capsys=capsys)[1].splitlines()
    assert f"    {answer['command']}" in lines


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "dropformer", "per_layer_config": ["no"]},
        {"model_type": "dropformer", "dropformer_modules": 3},
        {"model_type": "nemotron-nas", "base_model_type": "llama", "block_configs": [{}]},
        {"model_type": "nemotron-nas", "base_model_type": "llama", "block_configs": []},
        {"model_type": "dropformer", "per_layer_config": {"0": {"skip": 3}}},
    ],
)
def test_a_damaged_config_is_one_line(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="its files are not as dropformer writes them"):
        engines(tmp_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        engines(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        engines(tmp_path / "nowhere")
