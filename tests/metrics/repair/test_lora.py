"""Healing with low-rank adapters: closer to the dense model, in the model's own format, and nothing else changes."""

import pytest
import torch

from dropformer.metrics.blockwise.divergence import DenseReference, dropped_modules
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import Changes, variant
from dropformer.metrics.repair.base import shuffled
from dropformer.metrics.repair.lora import Healing, heal
from dropformer.prune.architecture import Layer
from dropformer.prune.discovery.discover import discover

HOW = Healing(rank=4, rate=1e-2, epochs=8, stride=1)
SIZES = {"gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4}}


@pytest.fixture
def opened(tiny):
    def made(family="llama"):
        model = tiny(family, **SIZES.get(family, {}))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim > 1 and "embed" not in name:
                    p *= 6  # a random model's branches add almost nothing: make them matter
        ids = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(3))
        architecture = discover(model)
        return model, architecture, BlockRunner(model, architecture, [{"input_ids": row[None]} for row in ids])

    return made


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_healing_brings_a_pruned_model_closer_to_the_dense_one(opened, family):
    model, architecture, runner = opened(family)
    dense, layers = DenseReference(runner), [Layer("attn", 1), Layer("mlp", 2)]
    changes = Changes(heal(runner, dropped_modules(model, architecture, layers), 1, HOW))
    variants = [variant(model, architecture, layers), variant(model, architecture, layers, changes)]
    dropped, healed = (damage.mean_kl for damage in dense.compare_each(variants))
    assert healed < 0.9 * dropped


def test_every_pass_takes_each_window_once_in_an_order_of_its_own():
    passes = [shuffled(20, epoch) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(20)) != order for order in passes) and passes[0] != passes[1]
    assert shuffled(20, 0) == passes[0]


def test_healing_leaves_the_dense_model_as_it_was(opened):
    model, architecture, runner = opened()
    before = {name: (p.clone(), p.requires_grad, id(p)) for name, p in model.named_parameters()}
    modules = [id(module) for module in model.modules()]
    healed = heal(runner, dropped_modules(model, architecture, [Layer("attn", 1)]), 1, Healing(rank=2, rate=1e-2))
    assert healed and [id(module) for module in model.modules()] == modules
    for name, p in model.named_parameters():
        value, flag, identity = before[name]
        assert torch.equal(value, p) and p.requires_grad == flag and id(p) == identity


def test_what_healing_changes_lies_behind_the_first_change_and_in_no_dropped_module(opened):
    model, architecture, runner = opened()
    healed = heal(runner, dropped_modules(model, architecture, [Layer("attn", 2)]), 2, Healing(rank=2, rate=1e-2))
    assert all(tensor.shape == model.get_parameter(name).shape for name, tensor in healed.items())
    assert {path.split(".")[2] for path in healed} == {"2", "3"}
    assert not any("self_attn" in path for path in healed if path.startswith("model.layers.2."))


def test_a_norm_is_healed_as_well_as_what_is_linear(opened):
    model, architecture, runner = opened()
    healed = heal(runner, dropped_modules(model, architecture, [Layer("attn", 1)]), 1, Healing(rank=2, rate=1e-2))
    norms = {name for name in healed if model.get_parameter(name).ndim == 1}
    assert "model.layers.2.post_attention_layernorm.weight" in norms
    assert all(not torch.equal(healed[name], model.get_parameter(name)) for name in norms)


def test_logits_in_parts_teach_what_all_of_them_teach(opened):
    model, architecture, runner = opened()
    modules = dropped_modules(model, architecture, [Layer("attn", 1)])
    whole, parts = (heal(runner, modules, 1, Healing(rank=2, stride=2, logits=size)) for size in (1 << 30, 2048))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)


def test_behind_the_last_block_nothing_is_left_to_heal(opened):
    model, architecture, runner = opened()
    assert heal(runner, dropped_modules(model, architecture, [Layer("block", 3)]), 3, HOW) == {}


def test_tokens_that_do_not_count_in_a_window_teach_nothing_even_where_they_count_in_another(opened):
    model, architecture, _ = opened()
    modules = dropped_modules(model, architecture, [Layer("attn", 1)])
    ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(3))
    counted, other = torch.zeros_like(ids, dtype=torch.bool), ids.clone()
    counted[0, 1:12] = counted[1, 12:] = True
    other[0, 12:] = ids[0, 12:].flip(0)  # behind all that counts in this window

    def taught(rows):
        runner = BlockRunner(model, architecture, [{"input_ids": rows}])
        runner.counted = [counted]
        return heal(runner, modules, 1, Healing(rank=2, rate=1e-2, stride=1))

    one, two = taught(ids), taught(other)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_blocks_that_run_again_teach_what_kept_activations_teach(opened):
    model, architecture, runner = opened()
    modules = dropped_modules(model, architecture, [Layer("attn", 1)])
    kept, again = (heal(runner, modules, 1, Healing(rank=2, room=room)) for room in (1 << 30, 0))
    assert all(torch.allclose(kept[name], again[name], atol=1e-5) for name in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_add_up_in_sixteen_bits(opened, dtype):
    model, architecture, _ = opened()
    model.to(dtype)
    ids = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(3))
    runner = BlockRunner(model, architecture, [{"input_ids": row[None]} for row in ids])
    dense, layers = DenseReference(runner), [Layer("attn", 1), Layer("mlp", 2)]
    changes = Changes(heal(runner, dropped_modules(model, architecture, layers), 1, HOW))
    variants = [variant(model, architecture, layers), variant(model, architecture, layers, changes)]
    dropped, healed = (damage.mean_kl for damage in dense.compare_each(variants))
    assert healed < 0.9 * dropped and {value.dtype for value in changes.tensors.values()} == {dtype}
