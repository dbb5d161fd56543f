"""Devices of models whose weights accelerate offloads: found, used, freed, and shared by pruned copies."""

import weakref
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

import dropformer
from dropformer import api
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import scored_windows
from dropformer.metrics.search.improve import Improver
from dropformer.metrics.search.strategy import Strategy
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.block_map import Surgery, map_blocks
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.proof import prove
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.discovery.trace import tracing
from dropformer.prune.loading.device import free_bytes, gpus_of, input_device, is_offloaded
from dropformer.prune.surgery.surgery import apply_surgery
from dropformer.prune.surgery.views import sharing_copy

CPU = torch.device("cpu")


@pytest.fixture
def offloaded(tiny, tmp_path):
    def make(family):
        model = tiny(family)
        disk_offload(model, str(tmp_path / family), execution_device=CPU)
        return model

    return make


def test_inputs_of_an_offloaded_model_belong_where_it_computes(tiny, offloaded):
    assert input_device(tiny("llama")) == CPU and not is_offloaded(tiny("llama"))
    assert input_device(offloaded("llama")) == CPU and is_offloaded(offloaded("llama"))
    with torch.device("meta"):
        bare = nn.Linear(2, 2)
    assert input_device(bare).type == "meta" and not is_offloaded(bare)


def test_the_gpus_of_a_model_are_those_of_its_weights_and_of_its_hooks(tiny):
    model = tiny("llama")
    assert gpus_of(model) == []
    cpu_offload(model, execution_device=CPU)
    for i, block in enumerate(model.model.layers):
        for module in block.modules():
            if hasattr(module, "_hf_hook"):
                hook = module._hf_hook
                getattr(hook, "hooks", [hook])[-1].execution_device = 1 - i % 2  # as accelerate numbers GPUs
    assert gpus_of(model) == [torch.device("cuda:0"), torch.device("cuda:1")]


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_an_offloaded_model_is_read_scored_and_pruned_like_one_in_memory(tiny, offloaded, ids, family):
    plain, model = tiny(family), offloaded(family)
    architecture = discover(model)
    prove(model, architecture)
    assert architecture == discover(plain)
    scores = [dropformer.analyze(m, [{"input_ids": ids}]) for m in (plain, model)]
    assert [s.similarity for s in scores[0].layers] == [s.similarity for s in scores[1].layers]
    for spec in ("attn:1,mlp:1", "block:1"):
        plan = dropformer.plan(scores[0], spec)
        with torch.no_grad():
            one, two = (dropformer.drop(m, plan)(ids).logits for m in (plain, model))
        assert torch.equal(one, two)


def test_tracing_lets_go_of_every_loaded_weight(offloaded, ids):
    model, loaded = offloaded("llama"), []

    def note(module, forward, *args):
        loaded.append(weakref.ref(module.weight))  # real here; accelerate puts the empty one back afterwards
        assert not module.weight.is_meta
        return forward(*args)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module._old_forward = partial(note, module, module._old_forward)
    with tracing(model) as trace:
        model(ids)
    assert trace.ops and loaded
    assert not any(ref() is not None for ref in loaded)


def test_a_pruned_copy_shares_what_the_hooks_hold(tiny):
    model = tiny("llama")
    cpu_offload(model, execution_device=CPU)
    copied = sharing_copy(model)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.3.self_attn.q_proj", "model.embed_tokens"):
        one, two = (m.get_submodule(name)._hf_hook for m in (model, copied))
        assert one is not two and one.weights_map is two.weights_map


def test_an_offloaded_weight_is_repaired_in_the_copy_alone(tiny, offloaded, ids):
    plain, model = tiny("llama"), offloaded("llama")
    outline = summarize(plain, discover(plain))
    name = "model.layers.0.mlp.down_proj.weight"
    new = {name: torch.full((32, 48), 0.1)}
    surgery = Surgery(outline, (), map_blocks(outline, ()), tensors=new)
    with torch.no_grad():
        before = plain(ids).logits
        one, two = (apply_surgery(sharing_copy(each), surgery)(ids).logits for each in (plain, model))
        assert torch.equal(one, two) and not torch.equal(one, before)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("repair", ["refit", "refit-all", "linear"])
def test_an_offloaded_model_is_repaired_like_one_in_memory(tiny, offloaded, ids, repair):
    found = []
    for model in (tiny("llama"), offloaded("llama")):
        improver = Improver(model, [made_up()], Strategy(repair=(repair,)))
        layers = [Layer("attn", 1), Layer("mlp", 2)]
        repaired, _ = improver.repair(layers)
        plan = api.plan_unscored(ModelRef(name="m"), improver.outline, "attn=1,mlp=2", (), None)
        with torch.no_grad():
            found.append(dropformer.drop(model, plan, repaired)(ids).logits)
    torch.testing.assert_close(*found)


def made_up():
    ids = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(0))
    return scored_windows(Calibration("made up", 8, 24), ids, torch.ones_like(ids).bool(), ids > 0)


def test_free_bytes_stay_below_the_processs_own_limit(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 8 * gib)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert free_bytes(torch.device("cuda:0")) == 64 * gib  # free, and reserved but unused
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.3)
    assert free_bytes(torch.device("cuda:0")) == 16 * gib
    assert free_bytes(CPU) > 0
