"""Whatever is in a checkpoint's files: a checkpoint that loads, or one line and exit status 2, soon."""

import json
import shutil
import time

import pytest
from command import run
from mutants import mutant
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dropformer.metrics.offload.process_memory import PeakMemory, shown
from dropformer.prune.loading.load import load

HELD = 600 << 20  # beside the 0.4 GiB that a fresh `prune` is resident with once torch and transformers are imported


@pytest.fixture(scope="module")
def honest(tmp_path_factory, tiny):
    """A tiny Llama in two shards with a tokenizer, and a plan for it."""
    folder = tmp_path_factory.mktemp("honest") / "model"
    model = tiny("llama", vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=3)
    model.save_pretrained(folder, max_shard_size="20KB")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({n: i for i, n in enumerate(["<pad>", "<s>", "</s>", *letters])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return folder


def outcome(*args, capsys) -> tuple[int, str]:
    """Exit status and stderr; fails where it is neither success nor one line, or takes ten seconds or 1 GiB resident.

    The memory counts from what this process holds already: other tests of it have left theirs.
    """
    memory, start = PeakMemory(), time.process_time()  # not the clock: other work on the machine is no fault of a file
    status, out, err = run(*args, "-q", capsys=capsys)
    assert time.process_time() - start < 10, err
    assert memory.extra < HELD, f"{shown(memory.extra)}: {err}"
    assert status in (0, 2) and "Traceback" not in err, err
    if status == 2:
        assert out == "" and err.count("\n") == 1, err
    return status, err


def plan_of(folder, here, capsys):
    if not (here / "plan.json").exists():
        args = ("--samples", 2, "--length", 16, "--out", here / "scores")
        assert run("analyze", folder, *args, "-q", capsys=capsys)[0] == 0
        made = ("plan", here / "scores" / "scores.json", "--drop", "attn=1", "--out", here / "plan.json")
        assert run(*made, capsys=capsys)[0] == 0
    return here / "plan.json"


def check(seeds, honest, here, capsys) -> None:
    plan = plan_of(honest, here, capsys)
    for seed in seeds:
        folder, out = here / f"m{seed}", here / f"out{seed}"
        what = mutant(honest, folder, seed)
        try:
            analyzed = ("analyze", folder, "--samples", 2, "--length", 16, "--out", here / f"s{seed}")
            if outcome(*analyzed, capsys=capsys)[0] == 2:
                assert not (here / f"s{seed}").exists()
            if outcome("--model", folder, "--plan", plan, "--out", out, capsys=capsys)[0] == 0:
                load(out)
            else:
                assert not out.exists()
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {what}: {type(error).__name__}: {error}") from error
        for path in (folder, out, here / f"s{seed}"):
            shutil.rmtree(path, ignore_errors=True)
    assert not list(here.glob(".dropformer-*"))


def test_mutated_files_end_in_a_checkpoint_that_loads_or_in_one_line(honest, here, capsys):
    check(range(12), honest, here, capsys)


@pytest.mark.slow
def test_mutated_files_by_the_hundred(honest, here, capsys):
    check(range(100, 500), honest, here, capsys)


CONFIGS = [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": 10**5}, {"num_hidden_layers": -1}, {"num_hidden_layers": 0},
    {"num_key_value_heads": 0}, {"num_attention_heads": 0}, {"architectures": [None]}, {"architectures": "x"},
    {"hidden_size": 10**9}, {"vocab_size": 10**12}, {"intermediate_size": 10**9}, {"num_labels": 10**9},
    {"max_position_embeddings": "x"}, {"rope_parameters": 5}, {"hidden_act": "none"}, {"head_dim": 0},
    {"auto_map": 5}, {"quantization_config": []}, {"quantization_config": {"quant_method": "x"}}, {"dtype": "x"},
    {"per_layer_config": {"x": 1}}, {"model_type": "none"}, {"model_type": 3}, {"layer_types": ["x"] * 3},
    {"transformers_weights": "other.safetensors"}, {"attn_implementation": "someone/kernel"},
    {"_attn_implementation": "someone/kernel"}, {"text_config": {"num_hidden_layers": 10**9}}, {"pad_token_id": 10**9},
]  # fmt: skip


@pytest.mark.parametrize("fields", CONFIGS, ids=[f"{name}-{i}" for i, c in enumerate(CONFIGS) for name in c])
def test_a_hostile_value_in_config_json_is_one_line_or_does_no_harm(honest, here, capsys, fields):
    folder = here / "model"
    shutil.copytree(honest, folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    outcome("analyze", folder, "--samples", 2, "--length", 16, "--out", here / "scores", capsys=capsys)


MORE = [
    ("config.json", {"id2label": {str(i): "x" for i in range(5000)}}), ("config.json", {"use_return_dict": False}),
    ("config.json", {"attn_implementation": "flex_attention"}), ("tokenizer_config.json", {"model_max_length": "x"}),
    ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
]  # fmt: skip


@pytest.mark.parametrize("name, fields", MORE, ids=[next(iter(fields)) for _, fields in MORE])
def test_a_value_that_a_library_chokes_on_is_one_line(honest, here, capsys, name, fields):
    folder = here / "model"
    shutil.copytree(honest, folder)
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **fields}))
    status, _ = outcome("analyze", folder, "--samples", 2, "--length", 16, "--out", here / "scores", capsys=capsys)
    assert status == 2
