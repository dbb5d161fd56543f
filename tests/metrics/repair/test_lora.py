"""Healing with low-rank adapters: closer to the dense model, in the model's own format, and nothing else changes."""

import sys

import pytest
import torch

from dropformer.metrics.blockwise.divergence import DenseReference, dropped_modules
from dropformer.metrics.blockwise.runner import BlockRunner
from dropformer.metrics.blockwise.variant import Changes, variant
from dropformer.metrics.repair.lora import Healing, heal, shuffled
from dropformer.metrics.search.improve import Improver
from dropformer.metrics.search.strategy import Strategy
from dropformer.prune.architecture import Layer
from dropformer.prune.discovery.discover import discover
from dropformer.prune.errors import PlanError

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


def test_merged_adapters_are_plain_linear_modules_behind_the_first_change(opened):
    model, architecture, runner = opened()
    healed = heal(runner, dropped_modules(model, architecture, [Layer("attn", 2)]), 2, Healing(rank=2, rate=1e-2))
    assert all(tensor.shape == model.get_parameter(name).shape for name, tensor in healed.items())
    assert {path.split(".")[2] for path in healed} == {"2", "3"}
    assert not any("self_attn" in path for path in healed if path.startswith("model.layers.2."))


def test_without_peft_the_error_says_what_to_install(opened, monkeypatch):
    model, _, _ = opened()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PlanError, match=r"pip install 'dropformer\[lora\]'"):
        Improver(model, [], Strategy(repair=("lora",)))
