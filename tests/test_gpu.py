"""What only a CUDA device shows: `pytest -m gpu`.  Tiny models; skipped where there is no device.

`DROPFORMER_TEST_DEVICE=cpu pytest -m gpu` rehearses on a CPU what does not ask for CUDA itself.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import dropformer
from dropformer import api
from dropformer.eval.cost.decoding import layer_latency
from dropformer.eval.cost.speed import Setting, measure
from dropformer.eval.cost.timing import Clock
from dropformer.metrics.analysis import measure as measuring
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.offload.streaming import open_streamed, stream_scores
from dropformer.metrics.search.improve import Improver, improve
from dropformer.metrics.search.strategy import Target, quality
from dropformer.prune.artifact import ModelRef
from dropformer.prune.discovery.discover import discover
from dropformer.prune.formats.export import reference
from dropformer.prune.loading.device import free_bytes, gpus_of, input_device
from dropformer.prune.loading.load import load
from dropformer.recipes.opening import LoadedModel

DEVICE = torch.device(os.environ.get("DROPFORMER_TEST_DEVICE", "cuda:0"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="a rehearsal: no CUDA")
WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}
PLACES = [{"device": DEVICE}, pytest.param({"device": None, "device_map": "auto"}, marks=cuda)]


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    tiny("llama", **WIDE).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def opened(folder):
    def make(device=DEVICE, **place) -> LoadedModel:
        model = load(folder, torch.bfloat16, device, **place)
        return LoadedModel(model, None, folder, reference("tiny", folder), None)

    return make


def data(samples=8, length=32) -> Windows:
    ids = torch.randint(3, 300, (samples, length), generator=torch.Generator().manual_seed(1))
    ref = CalibrationRef(name="random", samples=samples, length=length, seed=1, hash="0", packed=True, skip_first=0)
    return Windows(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool), ref)


@cuda
def test_a_model_is_loaded_onto_the_gpu_in_its_own_type(folder):
    model = load(folder)
    assert gpus_of(model) == [DEVICE] and input_device(model) == DEVICE
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.device for b in model.buffers()} == {DEVICE}


@cuda
@pytest.mark.parametrize("device_map", ["auto", "balanced"])
def test_a_device_map_gives_the_scores_of_one_device(opened, device_map):
    one, spread = opened(), opened(None, device_map=device_map)
    scores = [dropformer.analyze(m.model, data().batches(4)) for m in (one, spread)]
    for a, b in zip(scores[0].layers, scores[1].layers, strict=True):
        assert a.similarity == pytest.approx(b.similarity, abs=2e-3)


def test_scores_on_the_gpu_are_those_of_the_cpu(opened, folder):
    cpu = dropformer.analyze(load(folder, torch.float32, "cpu"), data().batches(2))
    gpu = dropformer.analyze(load(folder, torch.float32, DEVICE), data().batches(2))
    for a, b in zip(cpu.layers, gpu.layers, strict=True):
        assert a.similarity == pytest.approx(b.similarity, abs=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_a_drop_is_exported_and_proven_on_the_gpu(opened, tmp_path, place):
    dense = opened(**place)
    plan = api.plan_unscored(dense.ref, api.outline(dense.model), "attn=1,mlp=2", (), None)
    exported = api.save(api.drop(dense, plan), tmp_path / "out")
    assert exported.max_difference is not None and exported.max_difference < 1e-3


@cuda
def test_verification_takes_less_memory_than_a_second_model(opened, tmp_path):
    dense = opened()
    plan = api.plan_unscored(dense.ref, api.outline(dense.model), "attn=1", (), None)
    pruned = api.drop(dense, plan)
    api.save(pruned, tmp_path / "warm")  # kernels and their workspaces are loaded
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    api.save(pruned, tmp_path / "out")
    block = max(sum(p.nbytes for p in b.parameters()) for b in pruned.model.layers)
    outside = pruned.lm_head.weight.nbytes + pruned.model.embed_tokens.weight.nbytes
    assert torch.cuda.max_memory_allocated() - before < 4 * block + outside + 2**20


@cuda
def test_offloaded_weights_are_pruned_and_proven(opened, tmp_path):
    place = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    place |= {f"model.layers.{i}": "cpu" if i % 2 else 0 for i in range(4)}
    dense = opened(None, device_map=place)
    plan = api.plan_unscored(dense.ref, api.outline(dense.model), "attn=1,mlp=2", (), None)
    assert api.save(api.drop(dense, plan), tmp_path / "out").max_difference is not None


@cuda
def test_the_clock_reads_what_the_gpu_did():
    big = torch.randn(2048, 2048, device=DEVICE)
    big @ big
    short = Clock([DEVICE]).timed(lambda: big @ big)[1].wall
    long = Clock([DEVICE]).timed(lambda: [big @ big for _ in range(50)])[1].wall
    assert 0 < short < long < 10


@cuda
def test_every_layer_has_its_seconds(opened):
    model = opened().model
    found = layer_latency(model, discover(model), context=16, steps=3)
    assert all(seconds > 0 for seconds in found.seconds.values())


@cuda
def test_free_bytes_know_the_processs_limit():
    free, total = free_bytes(DEVICE), torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(0.1, DEVICE)
    try:
        assert free_bytes(DEVICE) <= 0.1 * total < free
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


@cuda
def test_compiled_decode_runs_with_a_static_cache(tiny):
    models = {"dense": tiny("llama").to(DEVICE), "other": tiny("llama").to(DEVICE)}
    torch.cuda.set_per_process_memory_fraction(0.02, DEVICE)
    try:
        table = measure(models, [Setting(16, 4), Setting(16, 16, "max")], repeats=2, compile=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert table.rows[-1].setting.batch > 1
    assert table.rows[0].peak.source == "cuda"


@pytest.mark.parametrize("way", ["refit", "refit-all", "linear", "distill", "lora", "linear,lora"])
def test_a_repair_finds_its_slots_in_16_bits(opened, way):
    model = opened().model
    assert next(model.parameters()).dtype == torch.bfloat16
    improver = Improver(model, [data(16)], quality("paper", repair=way))
    plan, repair, _ = improve(improver, opened().ref, Target("attn:2"), data(4))
    assert len(plan.layers) == 2  # found something to try; random weights say nothing of its worth
    assert repair.gates or "carries over to validation windows" in str(repair.unrepaired)


def test_the_best_quality_searches_on_the_gpu(opened):
    dense = opened()
    plan, _, _ = improve(Improver(dense.model, [data(16)], quality("best")), dense.ref, Target("attn:2"), data(4))
    assert len(plan.layers) == 2


def test_scores_of_16_bits_are_those_of_float32_within_rounding(folder):
    exact = dropformer.analyze(load(folder, torch.float32, DEVICE), data().batches(4))
    rounded = dropformer.analyze(load(folder, torch.bfloat16, DEVICE), data().batches(4))
    for a, b in zip(exact.layers, rounded.layers, strict=True):
        assert a.similarity == pytest.approx(b.similarity, abs=5e-3)


def test_streamed_scores_on_the_gpu_are_those_in_memory(folder):
    streamed = stream_scores(open_streamed(folder, device=DEVICE), data(), ModelRef(name="tiny"), 8 * 2**30, 2)
    whole = measuring.measure(load(folder, torch.bfloat16, DEVICE), data(), ModelRef(name="tiny"))
    assert streamed.similarity() == pytest.approx(whole.similarity(), abs=2e-3)


def test_windows_keep_few_tokens_and_generate_the_same_with_and_without_a_cache(opened):
    dense = opened()
    plan = api.plan_unscored(dense.ref, api.outline(dense.model), "window=1,2@8+2", (), None)
    pruned = api.drop(dense, plan).float()
    ids = data(2, 40).ids.to(DEVICE)
    with torch.inference_mode():
        whole = pruned(input_ids=ids, use_cache=False).logits
        cache = pruned(input_ids=ids[:, :30], use_cache=True).past_key_values
        steps = [pruned(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 30:], rtol=1e-3, atol=1e-3)
    assert cache.layers[1].keys.shape[2] <= 10 < cache.layers[0].keys.shape[2]


def test_a_draft_gives_the_dense_models_text(folder):
    model = load(folder, torch.float32, DEVICE)
    outline, ref = api.outline(model), ModelRef(name="tiny")
    draft = dropformer.draft(model, api.plan_unscored(ref, outline, "attn=1,window=2@8+2", (), None), 4)
    ids = data(1, 12).ids.to(DEVICE)
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    assisted = model.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=draft)
    assert assisted.tolist() == plain.tolist()


def test_images_are_scored_and_a_vision_model_is_pruned(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **shape)).eval().to(DEVICE)
    scores = dropformer.analyze(model, [{"pixel_values": torch.randn(2, 3, 32, 32)}])
    assert len(scores.layers) == 9
    pruned = api.drop(model, api.plan_unscored(scores.model, api.outline(model), "attn=1", (), None))
    assert api.save(pruned, tmp_path / "out").max_difference < 1e-3
