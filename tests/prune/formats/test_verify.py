"""A written checkpoint is proven from its files, block by block, and never loaded a second time as a whole."""

import json
from functools import partial

import pytest
import torch
from accelerate import disk_offload
from safetensors.torch import load_file, save_file

from dropformer import api
from dropformer.prune.errors import VerificationError
from dropformer.prune.formats import verify as verifying
from dropformer.prune.formats.export import reference
from dropformer.prune.formats.verify import verify
from dropformer.prune.loading.load import load
from dropformer.recipes.opening import LoadedModel

CPU = torch.device("cpu")


@pytest.fixture
def dropped(tiny, tmp_path):
    """A pruned model from a checkpoint's files, and the folder that its own checkpoint was written to."""

    def make(family, spec="attn=1", dtype=torch.float32, format="dropformer"):
        source = tmp_path / "dense"
        tiny(family).to(dtype).save_pretrained(source)
        dense = LoadedModel(load(source, dtype), None, source, reference("dense", source), None)
        plan = api.plan_unscored(dense.ref, api.outline(dense.model), spec, (), None)
        pruned = api.drop(dense, plan)
        api.save(pruned, tmp_path / "out", format=format)
        return pruned, tmp_path / "out"

    return make


@pytest.fixture
def written(dropped, monkeypatch):
    """The same; from then on only names and shapes may be loaded."""

    def make(*args):
        found = dropped(*args)
        monkeypatch.setattr(verifying, "load", only_names)
        return found

    return make


def only_names(folder, dtype=None, device=None, **trust):
    assert str(device) == "meta", "the checkpoint was loaded a second time"
    return load(folder, dtype, device, **trust)


@pytest.mark.parametrize(
    ("family", "spec", "dtype"),
    [("llama", "block=1", torch.bfloat16), ("mixtral", "attn=1", torch.float32), ("gemma2", "mlp=0", torch.float32)],
)
def test_blocks_are_read_one_by_one_and_what_is_equal_is_held_once(written, monkeypatch, family, spec, dtype):
    pruned, folder = written(family, spec, dtype)
    most, held = [], {p.data_ptr() for p in pruned.parameters()}

    class Watched(verifying._Pieces):
        def _fill(self, group):
            super()._fill(group)
            own = [p for p in self.built.parameters() if not p.is_meta and p.data_ptr() not in held]
            most.append(sum(p.numel() for p in own))

    monkeypatch.setattr(verifying, "_Pieces", Watched)
    assert verify(folder, pruned, pruned.dropformer.surgery) == 0
    assert len(most) > 4 and max(most) == 0


def test_the_pruned_model_of_an_offloaded_one_is_proven_too(written, tmp_path, monkeypatch):
    pruned, folder = written("llama")
    disk_offload(pruned, str(tmp_path / "offload"), execution_device=CPU)
    filled = []
    original = verifying._Pieces._leave

    def leave(self, block, *rest):
        filled.append(sum(p.numel() for p in self.built.model.layers.parameters() if not p.is_meta))
        original(self, block, *rest)

    monkeypatch.setattr(verifying._Pieces, "_leave", leave)
    assert verify(folder, pruned, pruned.dropformer.surgery) == 0
    assert max(filled) == max(sum(p.numel() for p in block.parameters()) for block in pruned.model.layers)


def changed(folder, name, change):
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    change(tensors[name])
    save_file(tensors, shard, {"format": "pt"})


def test_one_wrong_row_that_no_logit_shows_is_found_and_named(written):
    pruned, folder = written("llama")
    row = 63  # of a token that the sample batch may not hold
    changed(folder, "model.embed_tokens.weight", lambda tensor: tensor[row].mul_(2))
    with pytest.raises(VerificationError, match=r"model\.embed_tokens\.weight of the written checkpoint is not that"):
        verify(folder, pruned, pruned.dropformer.surgery)


def test_a_number_within_rounding_is_left_to_the_logits(written):
    pruned, folder = written("llama")
    changed(folder, "model.layers.0.mlp.up_proj.weight", lambda tensor: tensor[0, 0].mul_(1 + 2e-7))
    assert 0 <= verify(folder, pruned, pruned.dropformer.surgery) < 1e-4


def test_another_structure_is_found_by_its_logits(written):
    pruned, folder = written("llama")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="gives other logits"):
        verify(folder, pruned, pruned.dropformer.surgery)


def test_without_memory_for_the_check_nothing_is_lost(written, monkeypatch):
    pruned, folder = written("llama")

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(verifying._Pieces, "_fill", full)
    assert verify(folder, pruned, pruned.dropformer.surgery) is None


def test_a_layer_silenced_by_zeros_must_be_silent(dropped):
    pruned, folder = dropped("llama", format="dense")
    check = partial(verify, folder, pruned, pruned.dropformer.surgery, dense_names=True)
    assert check() == 0
    changed(folder, "model.layers.1.self_attn.o_proj.weight", lambda tensor: tensor[0].add_(1))
    with pytest.raises(VerificationError, match="other logits"):
        check()
