"""Choosing and repairing with blocks read from disk, or offloaded by accelerate, gives what memory gives."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from dropformer.metrics.blockwise.from_disk import open_source_of_blocks
from dropformer.metrics.blockwise.provider import InMemory, Offloaded
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.offload.keeper import Keeper
from dropformer.metrics.offload.process_memory import resident
from dropformer.metrics.search.improve import Improver, improve
from dropformer.metrics.search.strategy import Target, quality
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import ModelError

REF = CalibrationRef(name="ids", samples=4, length=24, seed=0, packed=True, skip_first=0, hash="0")


@pytest.fixture
def data():
    ids = torch.randint(3, 64, (16, 48), generator=torch.Generator().manual_seed(3))
    every = torch.ones_like(ids, dtype=torch.bool)
    return [Windows(part, every[:8], every[:8], REF) for part in (ids[:8], ids[8:])]


@pytest.fixture
def saved(tiny, tmp_path):
    def made(family):
        model = tiny(family)
        with torch.no_grad():  # a random model's branches add almost nothing: make them matter
            for name, p in model.named_parameters():
                if p.ndim > 1 and "embed" not in name:
                    p *= 6
        model.save_pretrained(tmp_path / family)
        return model, tmp_path / family

    return made


def chosen_and_repaired(improver, spec="attn:2"):
    plan, fixed, _ = improve(improver, ModelRef(name="tiny"), Target(spec))
    return plan.layers, fixed


@pytest.mark.parametrize(("family", "name"), [("llama", "best"), ("llama", "linear"), ("gemma2", "best")])
def test_blocks_read_from_disk_are_chosen_and_repaired_as_in_memory(saved, data, family, name):
    model, folder = saved(family)
    layers, fixed = chosen_and_repaired(Improver(model, data, quality(name)))
    opened = open_source_of_blocks(folder, 8 << 30)
    streamed = Improver(opened.model, data, quality(name), source=opened.source, keeper=opened.keeper)
    found, same = chosen_and_repaired(streamed)
    assert found == layers and fixed.tensors.keys() == same.tensors.keys() and fixed.tensors
    for key, tensor in fixed.tensors.items():
        torch.testing.assert_close(same.tensors[key], tensor)
    assert any(p.is_meta for p in opened.model.parameters())


def test_a_model_that_accelerate_offloads_to_disk_is_chosen_and_repaired_as_in_memory(saved, data, tmp_path):
    model, folder = saved("llama")
    layers, fixed = chosen_and_repaired(Improver(model, data, quality("best")))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i < 1 else "disk" for i in range(4)}
    split = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "off")
    improver = Improver(split, data, quality("best"))
    assert isinstance(improver.provider, Offloaded)
    found, same = chosen_and_repaired(improver)
    assert found == layers
    for key, tensor in fixed.tensors.items():
        torch.testing.assert_close(same.tensors[key], tensor)
    improver.provider.leave()
    assert any(p.is_meta for p in split.model.layers[2].parameters())


def test_a_repair_that_trains_the_whole_model_is_refused_before_anything_runs(saved, data):
    _, folder = saved("llama")
    opened = open_source_of_blocks(folder, 8 << 30)
    with pytest.raises(ModelError, match="--repair lora trains through the whole model"):
        Improver(opened.model, data, quality("healed"), source=opened.source)


def test_too_little_memory_is_said_with_how_much_is_needed(saved):
    _, folder = saved("llama")
    with pytest.raises(ModelError, match="give at least"):
        open_source_of_blocks(folder, 50 << 20)


def test_streams_beyond_the_allowance_lie_in_files_and_nothing_changes(saved, data):
    model, _ = saved("llama")
    expected = chosen_and_repaired(Improver(model, data, quality("best")))[1]
    keeper = Keeper(host=0)
    keeper.keep(torch.zeros(1))
    found = chosen_and_repaired(Improver(model, data, quality("best"), keeper=keeper))[1]
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_tensor_kept_in_a_file_is_the_same_and_its_file_has_no_name(tmp_path, dtype):
    keeper = Keeper(host=0, folder=tmp_path)
    tensor = torch.arange(40_000).to(dtype).view(200, 200)
    kept = keeper.keep(tensor.T)
    assert torch.equal(kept, tensor.T) and not list(tmp_path.iterdir())
    assert keeper.held["disk"] == tensor.numel() * tensor.element_size()
    del kept
    assert keeper.held["disk"] == 0


def test_a_model_in_memory_needs_no_bringing(saved, data):
    model, _ = saved("llama")
    assert isinstance(Improver(model, data).provider, InMemory)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_what_was_read_from_a_file_is_given_back_and_read_again(tmp_path):
    keeper, tensor = Keeper(host=0, folder=tmp_path), torch.arange(8 << 20, dtype=torch.int32)
    kept = keeper.keep(tensor)
    keeper.release()
    before = resident()
    assert torch.equal(kept, tensor)
    read = resident()
    keeper.release()
    assert read - before > 24 << 20 and resident() - before < 8 << 20
    assert torch.equal(kept, tensor)
