"""Weights that do not fit: each block is read once, waiting passes go to disk, the scores are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel

from dropformer.metrics.analysis.capture import WindowScores
from dropformer.metrics.analysis.measure import measure
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.offload import passes, streaming
from dropformer.metrics.offload.process_memory import parse_bytes, resident
from dropformer.metrics.offload.spill import Spill, storages_in
from dropformer.metrics.offload.streaming import open_streamed, stream, stream_scores
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import CheckpointError, DropformerError, ModelError
from dropformer.prune.loading.load import load

REF = ModelRef(name="tiny", fingerprint="f" * 64)
GIB = 1 << 30


def windows(samples=5, length=16, padded=False, vocab=64):
    from dropformer.metrics.calibration.settings import CalibrationRef

    ids = torch.randint(3, vocab, (samples, length), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids).bool()
    if padded:
        real[1, 9:] = False
        ids[1, 9:] = 0
    ref = CalibrationRef(name="x", samples=samples, length=length, seed=0, packed=True, skip_first=0, hash="0")
    return Windows(ids, real, real, ref)


FAMILIES = {"llama": {"tie_word_embeddings": True}, "gemma2": {"head_dim": 8}, "phi": {}}
FAMILIES |= {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}}
FAMILIES |= {"mixtral": {"num_local_experts": 4}}  # whose files hold each expert by itself


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_scores_equal_those_in_memory(family, tiny, tmp_path):
    tiny(family, **FAMILIES[family]).save_pretrained(tmp_path)
    streamed = open_streamed(tmp_path)
    scores = stream_scores(streamed, windows(), REF, 8 * GIB, 2)
    whole = measure(load(tmp_path), windows(), REF)
    assert scores.similarity() == pytest.approx(whole.similarity(), abs=1e-5)
    assert scores.stderr() == pytest.approx(whole.stderr(), abs=1e-5)
    assert (scores.tokens, scores.outline, scores.calibration) == (whole.tokens, whole.outline, whole.calibration)
    assert streamed.weights.bytes_read <= 1.05 * streamed.weights.checkpoint.nbytes


def test_a_post_norm_encoder_streams_too(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=64, **shape)).save_pretrained(tmp_path)
    scores = stream_scores(open_streamed(tmp_path), windows(padded=True), REF, 8 * GIB, 2)
    assert scores.similarity() == pytest.approx(
        measure(load(tmp_path), windows(padded=True), REF).similarity(), abs=1e-5
    )


@pytest.mark.parametrize("allowance", [0, 6000])
def test_passes_on_disk_give_the_same_numbers(allowance, tiny, tmp_path, monkeypatch):
    tiny("gemma2", head_dim=8).save_pretrained(tmp_path)
    files = []

    class Tight(Spill):
        """Every storage goes to disk, however small, but for what the allowance takes."""

        def __init__(self, folder):
            super().__init__(folder)
            self.fixed = allowance

        def park(self, number, frame, keep):
            self.allowance = self.fixed
            super().park(number, frame, keep)
            files.append(len(list(self.folder.iterdir())))
            assert self.resident <= max(allowance, 0)

    monkeypatch.setattr(streaming, "Spill", Tight)
    monkeypatch.setattr("dropformer.metrics.offload.spill.SMALLEST", 0)
    data = windows(padded=True)
    scores = stream_scores(open_streamed(tmp_path), data, REF, 8 * GIB, 1)
    assert max(files) >= (5 if allowance == 0 else 2)
    assert scores.similarity() == pytest.approx(measure(load(tmp_path), data, REF).similarity(), abs=1e-6)


def test_a_parked_tensor_and_its_views_come_back_as_they_were(tmp_path):
    spill, whole = Spill(tmp_path), torch.arange(40_000, dtype=torch.float32)
    view, before = whole.view(200, 200)[3:50].T, whole.clone()
    others = {s.data_ptr() for s in storages_in(sys._getframe())} - {whole.data_ptr()}
    spill.park(1, sys._getframe(), keep=others)
    assert whole.untyped_storage().nbytes() == 0
    spill.restore(1)
    assert torch.equal(whole, before) and torch.equal(view, before.view(200, 200)[3:50].T)


def test_a_large_embedding_is_read_row_by_row(tiny, tmp_path, monkeypatch):
    tiny("llama", vocab_size=4096).save_pretrained(tmp_path)
    monkeypatch.setattr(passes, "LARGE_EMBEDDING", 1000)
    streamed = open_streamed(tmp_path)
    rows = stream(streamed, windows(vocab=4096), [0, 1, 2], 1, 8 * GIB)
    used = windows(vocab=4096).ids[:3].unique().numel()
    blocks = sum(s.nbytes for n, s in streamed.weights.checkpoint.tensors.items() if ".layers." in n)
    assert streamed.weights.bytes_read == blocks + used * 32 * 4 + 32 * 4  # and the final norm
    whole = measure(load(tmp_path), windows(vocab=4096), REF)
    torch.testing.assert_close(rows.sums, _first(whole, tmp_path, 3).sums, atol=1e-5, rtol=0)


def _first(_scores, folder, count) -> WindowScores:
    from dropformer.metrics.analysis.analyze import joined, measuring, proven

    model = load(folder)
    with measuring(model, proven(model)) as run:
        return joined([run(*windows(vocab=4096).batch([i])) for i in range(count)])


def test_only_one_block_is_in_memory_at_a_time(tiny, tmp_path):
    tiny("llama", num_hidden_layers=6).save_pretrained(tmp_path)
    streamed, loaded = open_streamed(tmp_path), []

    def count(_done, _tokens):
        layers = streamed.model.model.layers
        loaded.append(sum(not p.is_meta for layer in layers for p in layer.parameters()))

    stream(streamed, windows(), [0, 1], 1, 8 * GIB, count)
    assert max(loaded) == len(list(streamed.model.model.layers[0].parameters()))
    assert streamed.weights.bytes_read <= streamed.weights.checkpoint.nbytes


def test_bfloat16_files_are_cast_on_the_way(tiny, tmp_path):
    tiny("llama").bfloat16().save_pretrained(tmp_path)
    scores = stream_scores(open_streamed(tmp_path), windows(), REF, 8 * GIB, 2)
    assert scores.similarity() == pytest.approx(measure(load(tmp_path), windows(), REF).similarity(), abs=1e-5)


def test_too_small_a_budget_is_said_before_anything_is_read(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    streamed = open_streamed(tmp_path)
    with pytest.raises(ModelError, match="give at least"):
        stream(streamed, windows(), [0], 1, resident() // 2)
    assert streamed.weights.bytes_read == 0


def test_a_missing_tensor_is_one_line_and_leaves_no_pass_hanging(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight"):
        stream(open_streamed(tmp_path), windows(), [0, 1], 1, 8 * GIB)


def test_quantized_checkpoints_are_refused(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DropformerError, match="quantized"):
        open_streamed(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 * GIB), ("500MB", 500 * 10**6), ("1.5g", 15 * 10**8), ("64", 64)]
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "2 bananas", "GiB", "1e400GiB"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ModelError, match="expected for example 2GiB"):
        parse_bytes(text)


CHILD = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_streaming import windows
from dropformer.metrics.offload.process_memory import peak
from dropformer.metrics.offload.streaming import open_streamed, stream
streamed = open_streamed(Path(sys.argv[2]))
data = windows(samples=24, length=128)
stream(streamed, data, list(range(24)), 1, int(sys.argv[3]))
print(json.dumps([peak(), streamed.weights.bytes_read, streamed.weights.checkpoint.nbytes]))
"""


@pytest.mark.slow  # several processes that each import everything
def test_peak_memory_does_not_grow_with_depth_and_stays_under_the_budget(tmp_path):
    peaks = []
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        config = AutoConfig.for_model(
            "llama",
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=layers,
            num_attention_heads=8,
            vocab_size=64,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="60MB")
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder), str(700 << 20)]
        made = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        peak, read, nbytes = json.loads(made.stdout.splitlines()[-1])
        assert peak < 700 << 20 and read <= 1.05 * nbytes
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 30 << 20  # twelve more layers weigh 192 MiB
