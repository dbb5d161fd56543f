"""What only a CUDA device shows: `pytest -m gpu`.  Tiny models; skipped where there is no device."""

from pathlib import Path

import pytest
import torch

import dropformer
from dropformer import api
from dropformer.eval.cost.latency import layer_latency
from dropformer.eval.cost.speed import Setting, measure
from dropformer.eval.cost.timing import Clock
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.search.strategy import REPAIRS, Target, quality
from dropformer.prune.discovery.discover import discover
from dropformer.prune.formats.export import reference
from dropformer.prune.loading.device import free_bytes, gpus_of, input_device
from dropformer.prune.loading.load import load
from dropformer.recipes.opening import LoadedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda:0")
WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300}


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    tiny("llama", **WIDE).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def opened(folder):
    def make(device="cuda:0", **place) -> LoadedModel:
        return LoadedModel(load(folder, None, device, **place), None, folder, reference("tiny", folder), None)

    return make


def data(samples=8, length=32) -> Windows:
    ids = torch.randint(3, 300, (samples, length), generator=torch.Generator().manual_seed(1))
    ref = CalibrationRef(name="random", samples=samples, length=length, seed=1, hash="0" * 64, packed=True)
    return Windows(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool), ref)


def test_a_model_is_loaded_onto_the_gpu_in_its_own_type(folder):
    model = load(folder)
    assert gpus_of(model) == [GPU] and input_device(model) == GPU
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.device for b in model.buffers()} == {GPU}


@pytest.mark.parametrize("device_map", ["auto", "balanced"])
def test_a_device_map_gives_the_scores_of_one_device(opened, device_map):
    one, spread = opened(), opened(None, device_map=device_map)
    scores = [dropformer.analyze(m.model, data().batches(4)) for m in (one, spread)]
    for a, b in zip(scores[0].layers, scores[1].layers, strict=True):
        assert a.similarity == pytest.approx(b.similarity, abs=2e-3)


def test_scores_on_the_gpu_are_those_of_the_cpu(opened, folder):
    cpu = dropformer.analyze(load(folder, torch.float32, "cpu"), data().batches(2))
    gpu = dropformer.analyze(load(folder, torch.float32, GPU), data().batches(2))
    for a, b in zip(cpu.layers, gpu.layers, strict=True):
        assert a.similarity == pytest.approx(b.similarity, abs=1e-5)


@pytest.mark.parametrize("place", [{"device": "cuda:0"}, {"device": None, "device_map": "auto"}])
def test_a_drop_is_exported_and_proven_on_the_gpu(opened, tmp_path, place):
    dense = opened(**place)
    plan = api.plan_unscored(dense.ref, api.outline(dense.model), "attn=1,mlp=2", (), None)
    exported = api.save(api.drop(dense, plan), tmp_path / "out")
    assert exported.max_difference is not None and exported.max_difference < 1e-3


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


def test_offloaded_weights_are_pruned_and_proven(opened, tmp_path):
    place = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    place |= {f"model.layers.{i}": "cpu" if i % 2 else 0 for i in range(4)}
    dense = opened(None, device_map=place)
    plan = api.plan_unscored(dense.ref, api.outline(dense.model), "attn=1,mlp=2", (), None)
    assert api.save(api.drop(dense, plan), tmp_path / "out").max_difference is not None


def test_the_clock_reads_what_the_gpu_did():
    big = torch.randn(2048, 2048, device=GPU)
    big @ big
    short = Clock([GPU]).timed(lambda: big @ big)[1].wall
    long = Clock([GPU]).timed(lambda: [big @ big for _ in range(50)])[1].wall
    assert 0 < short < long < 10


def test_every_layer_has_its_seconds(opened):
    model = opened().model
    found = layer_latency(model, discover(model), context=16, steps=3)
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_free_bytes_know_the_processs_limit():
    free, total = free_bytes(GPU), torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction(0.1, GPU)
    try:
        assert free_bytes(GPU) <= 0.1 * total < free
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def test_compiled_decode_runs_with_a_static_cache(tiny):
    models = {"dense": tiny("llama").to(GPU), "other": tiny("llama").to(GPU)}
    torch.cuda.set_per_process_memory_fraction(0.02, GPU)
    try:
        table = measure(models, [Setting(16, 4), Setting(16, 16, "max")], repeats=2, compile=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    assert table.rows[-1].setting.batch > 1
    assert table.rows[0].peak.source == "cuda"


@pytest.mark.parametrize("way", [way for way in ("refit", "linear", "distill", "lora") if way in REPAIRS])
def test_a_repair_finds_its_slots_in_16_bits(opened, way):
    from dropformer.metrics.search.improve import Improver, improve

    model = opened().model
    assert next(model.parameters()).dtype == torch.bfloat16
    improver = Improver(model, [data(16)], quality("paper", repair=way))
    plan, repair, _ = improve(improver, opened().ref, Target("attn:1"), data(4))
    assert len(plan.layers) == 1 and repair.gates  # found something to try; random weights say nothing of its worth
