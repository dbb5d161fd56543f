import json

import gguf
import numpy as np
import pytest
import torch
from gguf_families import family_gguf, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from dropformer.prune.errors import CheckpointError
from dropformer.prune.formats.gguf.header import read_gguf_header
from dropformer.recipes.gguf import convert_gguf

F32, F16, BF16, Q4_1, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q4_1", "Q8_0"))


def weights(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_the_model_that_it_was_made_of(tmp_path, tiny, tied):
    model = tiny.llama(tied)
    folder = convert_gguf(tiny.write(tmp_path / "tiny.gguf", model))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    assert type(loaded) is type(model) and loaded.dtype == torch.float32
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "family", ["qwen3", "qwen3_moe", "qwen2_moe", "gemma2", "gemma3_text", "gpt2", "stablelm", "nemotron", "bloom"]
)
def test_files_of_other_families_become_the_models_that_they_were_made_of(tmp_path, family):
    """With heads, experts, rotary shares and query scales that are not transformers' defaults."""
    model = tiny_model(family, blocks=2)
    loaded = AutoModelForCausalLM.from_pretrained(convert_gguf(family_gguf(tmp_path / "tiny.gguf", model)))
    ids = torch.arange(20)[None]
    assert type(loaded) is type(model)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_tied_embeddings_are_written_once_and_stay_tied(tmp_path, tiny):
    folder = convert_gguf(tiny.write(tmp_path / "tiny.gguf", tiny.llama(tied=True)))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert "lm_head.weight" not in weights(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" in weights(convert_gguf(tiny.write(tmp_path / "two.gguf", tiny.llama(tied=False))))


@pytest.mark.parametrize("kind", [Q4_1, Q8_0])
def test_quantized_values_are_kept_exactly(tmp_path, tiny, kind):
    model = tiny.llama()
    path = tiny.write(tmp_path / "tiny.gguf", model, kind)
    found = weights(convert_gguf(path))
    for name, value in tiny.tensors(model).items():
        if name in ("blk.1.ffn_down.weight", "token_embd.weight"):
            exact = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
            key = "model.embed_tokens" if "token" in name else "model.layers.1.mlp.down_proj"
            assert np.array_equal(found[f"{key}.weight"].numpy(), exact)
            assert not np.array_equal(exact, value)


@pytest.mark.parametrize(("kind", "dtype"), [(BF16, torch.bfloat16), (F16, torch.float16), (F32, torch.float32)])
def test_a_file_of_16_bit_values_keeps_its_width(tmp_path, tiny, kind, dtype):
    model = tiny.llama().to(dtype).float()
    folder = convert_gguf(tiny.write(tmp_path / "tiny.gguf", model, kind))
    assert {value.dtype for value in weights(folder).values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded = AutoModelForCausalLM.from_pretrained(folder).float()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_single_value_that_16_bits_cannot_hold_keeps_the_model_in_float32(tmp_path, tiny):
    model = tiny.llama().to(torch.bfloat16).float()
    with torch.no_grad():
        model.model.norm.weight[0] = 1 + 2**-20
    folder = convert_gguf(tiny.write(tmp_path / "tiny.gguf", model, F16))
    assert {value.dtype for value in weights(folder).values()} == {torch.float32}


def test_the_folder_is_an_ordinary_one(tmp_path, tiny):
    folder = convert_gguf(tiny.write(tmp_path / "tiny.gguf", tiny.llama(), Q8_0))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and "_model_name_or_path" not in config
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == config["max_position_embeddings"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>hello<|im_end|>"


def test_a_file_is_converted_once_and_again_when_it_changes(tmp_path, tiny):
    told: list[str] = []
    path = tiny.write(tmp_path / "tiny.gguf", tiny.llama())
    first = convert_gguf(path, told.append)
    assert convert_gguf(path, told.append) == first and told == ["converting tiny.gguf (once)"]
    tiny.write(path, tiny.llama(), F16)
    assert convert_gguf(path, told.append) != first and len(told) == 2


def refused(path, words, own_cache):
    """That `path` is refused in one line with `words`, and that nothing of it stays in the cache."""
    with pytest.raises(CheckpointError, match=words) as caught:
        convert_gguf(path)
    assert "\n" not in str(caught.value)
    assert not [entry for entry in own_cache.glob("gguf/*") if not entry.name.endswith(".lock")]


def test_a_truncated_file_is_refused_before_anything_is_loaded(tmp_path, tiny, own_cache):
    path = tiny.write(tmp_path / "tiny.gguf", tiny.llama())
    whole = path.read_bytes()
    for length, words in ((len(whole) - 5000, "cut short"), (3000, "cut short|damaged"), (10, "damaged")):
        path.write_bytes(whole[:length])
        refused(path, words, own_cache)


def test_a_file_that_is_no_gguf_is_refused(tmp_path, own_cache):
    for content in (b"", b"GG", b"PK\x03\x04" + bytes(100)):
        (tmp_path / "x.gguf").write_bytes(content)
        refused(tmp_path / "x.gguf", "no GGUF file|damaged", own_cache)


def test_an_architecture_unknown_to_transformers_is_refused(tmp_path, tiny, own_cache):
    path = tiny.write(tmp_path / "tiny.gguf", tiny.llama())
    path.write_bytes(path.read_bytes().replace(b"llama", b"lhama"))
    refused(path, "lhama", own_cache)


def test_a_missing_tensor_is_refused_instead_of_initialised_at_random(tmp_path, tiny, own_cache):
    path = tiny.write(tmp_path / "tiny.gguf", tiny.llama(), edit=lambda tensors: tensors.pop("blk.1.ffn_up.weight"))
    refused(path, "lacks 1 of the model's parameters .*up_proj", own_cache)


def test_a_tensor_that_would_be_ignored_is_refused(tmp_path, tiny, own_cache):
    def add_bias(tensors):
        tensors["blk.0.attn_q.bias"] = np.ones(64, np.float32)

    refused(tiny.write(tmp_path / "tiny.gguf", tiny.llama(), edit=add_bias), "has .* weights, but", own_cache)


def test_scaled_rotary_frequencies_are_refused_because_transformers_would_ignore_them(tmp_path, tiny, own_cache):
    def add_table(tensors):
        tensors["rope_freqs.weight"] = np.ones(8, np.float32)

    refused(tiny.write(tmp_path / "tiny.gguf", tiny.llama(), edit=add_table), "rotary", own_cache)


def test_the_header_is_that_of_the_gguf_package(tmp_path, tiny):
    path = tiny.write(tmp_path / "tiny.gguf", tiny.llama(), Q4_1)
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert {n: (t.kind, t.shape, t.elements, t.nbytes, t.start) for n, t in header.tensors.items()} == {
        t.name: (t.tensor_type, tuple(t.shape), t.n_elements, t.n_bytes, t.data_offset) for t in reader.tensors
    }
    assert header.text("tokenizer.ggml.pre") == "smollm"
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["tokenizer.ggml.tokens"] == len(tiny.vocabulary())


@pytest.fixture(scope="session")
def header_bytes(tmp_path_factory):
    """The first bytes of a small GGUF file."""
    writer = gguf.GGUFWriter(path := tmp_path_factory.mktemp("header") / "x.gguf", "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("t", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@given(data=st.data())
def test_whatever_bytes_are_wrong_in_a_header_the_error_is_ours(header_bytes, tmp_path_factory, data):
    broken = bytearray(header_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    path.write_bytes(broken)
    try:
        read_gguf_header(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
