"""Block-wise distillation: closer to the dense stream in every family and dtype, and nothing else changes."""

import pytest
import torch

from dropformer.metrics.blockwise.divergence import DenseReference
from dropformer.metrics.blockwise.variant import Changes
from dropformer.metrics.repair.distill import Distilling, aims, fit_blocks
from dropformer.metrics.repair.linear import fit_maps
from dropformer.metrics.search.improve import Improver, improve
from dropformer.metrics.search.strategy import Strategy, Target, quality
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.discovery.discover import discover

HOW = Distilling(rate=2e-2, epochs=12)
FAMILIES: dict[str, dict] = {
    **{name: {} for name in ("llama", "gpt2", "gemma3_text", "olmo2", "gpt_neox", "phi", "mixtral", "bert")},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_next": {},
}
REF = ModelRef(name="tiny")


def distilled(improver, gone, how=HOW, **settings):
    found: Improver = improver(Strategy(stride=1), **settings)
    said = []
    found.tell = said.append
    context = found.context(gone)
    changes = fit_blocks(context, how)
    return found, changes, said


def kl(found, *variants):
    return [damage.mean_kl for damage in DenseReference(found.bench.runner).compare_each(variants)]


@pytest.mark.parametrize("family", FAMILIES)
def test_distilled_blocks_come_closer_to_the_dense_model_whatever_the_family(improver, family):
    gone = [Layer("attn", 1), Layer("mlp", 2)]
    how = Distilling(rate=2e-2, epochs=3) if family == "qwen3_next" else HOW
    found, changes, _ = distilled(improver, gone, how, family=family, **FAMILIES[family])
    before, after = kl(found, found.context(gone).variant(), found.context(gone).variant(changes))
    assert changes.tensors and after < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_distil_as_float32_does(improver, dtype):
    gone = [Layer("attn", 1), Layer("block", 2)]
    found, changes, _ = distilled(improver, gone, dtype=dtype)
    before, after = kl(found, found.context(gone).variant(), found.context(gone).variant(changes))
    assert after < before and {t.dtype for t in changes.tensors.values()} == {dtype}
    assert {name.split(".")[2] for name in changes.tensors} <= {"0", "1", "3"}


def test_the_dense_model_stays_as_it_was(improver):
    found: Improver = improver(Strategy(stride=1))
    before = {name: (p.clone(), p.requires_grad, id(p)) for name, p in found.model.named_parameters()}
    changes = fit_blocks(found.context([Layer("block", 1)]), Distilling(epochs=1))
    for name, p in found.model.named_parameters():
        value, flag, identity = before[name]
        assert torch.equal(value, p) and p.requires_grad == flag and id(p) == identity
        assert name not in changes.tensors or changes.tensors[name].data_ptr() != p.data_ptr()


def test_blocks_around_gaps_are_trained_towards_where_the_next_branch_reads(tiny):
    architecture = discover(tiny("llama", num_hidden_layers=6))
    found = aims(architecture, architecture.stacks[0], [Layer("attn", 1), Layer("block", 3), Layer("block", 4)])
    assert {block: (place.block, place.layer.kind) for block, place in found.items()} == {
        0: (1, "attn"),
        1: (1, "mlp"),
        2: (4, "mlp"),
        5: (5, "mlp"),
    }


def test_few_windows_are_passed_more_often_unless_someone_says_how_often():
    assert [Distilling().passes(n) for n in (12, 48, 0)] == [8, 2, 96]
    assert Distilling(epochs=2).passes(12, 0.1) == 2
    assert [Distilling().passes(64, share) for share in (4 / 18, 7 / 18, 18 / 18)] == [4, 2, 2]


def test_routers_are_left_alone(improver):
    _, changes, _ = distilled(improver, [Layer("attn", 1)], Distilling(rate=2e-2, epochs=2), family="mixtral")
    names = {name.partition(".mlp.")[2] for name in changes.tensors if ".mlp." in name}
    assert any(name.startswith("experts") for name in names) and not any(n == "gate.weight" for n in names)


def test_a_block_that_training_does_not_help_keeps_its_weights(improver):
    _, changes, said = distilled(improver, [Layer("attn", 1)], Distilling(rate=10.0, epochs=1))
    assert not changes.tensors and len(said) == 2 and all("on validation windows" in line for line in said)


def test_it_says_where_a_window_has_no_other_to_be_validated_on(improver):
    found, said = improver(quality(repair="distill"), rows=1), []
    found.tell = said.append
    found.repair([Layer("attn", 2)])
    assert said and all("on the windows that it is trained on" in line for line in said if line.startswith("distill"))


def test_maps_are_trained_further(improver):
    found: Improver = improver(Strategy(repair=("linear",), stride=1))
    gone = [Layer("attn", 1)]
    fitted = fit_maps(found.context(gone))
    maps = Changes({name: torch.zeros_like(t) for name, t in fitted.tensors.items()}, fitted.maps)
    changes = fit_blocks(found.context(gone, maps), HOW)
    assert "model.layers.1.self_attn.weight" in changes.tensors
    before, after = kl(found, found.context(gone, maps).variant(), found.context(gone, maps | changes).variant())
    assert after < before


def test_distillation_goes_by_its_name_and_is_gated(improver):
    found: Improver = improver(Strategy(repair=("distill",), stride=1))
    _, repair, _ = improve(found, REF, Target("attn=1"), found.data[0])
    assert [gate.method for gate in repair.gates] in (["distill"], [])
    assert bool(repair.tensors) == any(gate.passed for gate in repair.gates)
