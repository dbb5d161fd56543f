"""Refits: which slots mend which gaps, closer to the dense stream in every family and dtype."""

import pytest
import torch

from dropformer.metrics.blockwise.divergence import DenseReference
from dropformer.metrics.repair.gaps import all_slots, gap_targets, gaps, reaches
from dropformer.metrics.repair.linear import map_target
from dropformer.metrics.repair.sequential import SequentialRefit
from dropformer.prune.architecture import Layer
from dropformer.prune.discovery.discover import discover

FAMILIES = ["llama", "gpt2", "gpt_neox", "phi", "gptj", "gemma2", "gemma3_text", "olmo2", "granite"]


def test_a_gap_belongs_to_the_last_branch_before_it(tiny):
    architecture = discover(tiny("llama"))
    assert gaps(architecture, [Layer("attn", 0), Layer("attn", 2), Layer("block", 3)]) == {
        Layer("mlp", 1): [Layer("attn", 2)],
        Layer("mlp", 2): [Layer("attn", 3), Layer("mlp", 3)],
    }


def test_a_parallel_block_that_lost_a_branch_is_mended_by_its_other_branch(tiny):
    architecture = discover(tiny("gpt_neox"))
    assert gaps(architecture, [Layer("mlp", 1)]) == {Layer("attn", 1): [Layer("mlp", 1)]}
    assert gaps(architecture, [Layer("attn", 1)]) == {Layer("mlp", 1): [Layer("attn", 1)]}


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("kinds", [["attn", "mlp"], ["block"]])
def test_one_pass_for_all_candidates_gives_the_fit_of_each_gap(opened, family, kinds):
    found = opened(family)
    candidates = [layer for layer in found.architecture.layers() if layer.kind in kinds]
    gone = [Layer("block", 1), Layer("block", 2)] if "block" in kinds else [Layer("mlp", 1), Layer("attn", 2)]
    _, wide = found.independent(reaches(found.architecture, candidates, found.slots, 2), [1e-3])
    _, narrow = found.independent(gap_targets(found.architecture, gone, found.slots), [1e-3])
    assert narrow and narrow.keys() <= wide.keys()
    for key, fit in narrow.items():
        for name, tensor in fit.tensors.items():
            torch.testing.assert_close(tensor, wide[key].tensors[name], rtol=1e-3, atol=1e-4)
            assert not torch.equal(tensor, found.model.get_parameter(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_independent_refit_brings_the_stream_closer_whatever_the_family(opened, family):
    found, gone = opened(family), [Layer("attn", 2)]
    dense = DenseReference(found.runner)
    tensors, _ = found.independent(gap_targets(found.architecture, gone, found.slots))
    repaired, dropped = found.variant(gone, tensors), found.variant(gone)
    assert tensors and found.stream_error(repaired, dense) < found.stream_error(dropped, dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequential_refit_brings_the_stream_closer_whatever_the_family(opened, family):
    found, gone = opened(family), [Layer("attn", 1)]
    dense = DenseReference(found.runner)
    slots = all_slots(found.architecture, gone, found.slots)
    refit = SequentialRefit(found.runner, found.architecture, gone, found.groups, penalties=[1e-4])
    tensors = refit.refit(slots)
    assert {fit.slot for fit in refit.fits} <= set(slots)
    assert found.stream_error(found.variant(gone, tensors), dense) < found.stream_error(found.variant(gone), dense)


@pytest.mark.parametrize("gone", [[Layer("block", 1)], [Layer("attn", 1), Layer("mlp", 2)]])
def test_blocks_and_mixed_drops_are_refitted_too(opened, gone):
    found = opened()
    dense, slots = DenseReference(found.runner), all_slots(found.architecture, gone, found.slots)
    one, _ = found.independent(gap_targets(found.architecture, gone, found.slots))
    every = SequentialRefit(found.runner, found.architecture, gone, found.groups, penalties=[1e-4]).refit(slots)
    before = found.stream_error(found.variant(gone), dense)
    assert found.stream_error(found.variant(gone, one), dense) < before
    assert found.stream_error(found.variant(gone, every), dense) < before


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "gemma2", "granite"])
def test_all_slots_in_one_go_are_what_one_after_the_other_gives(opened, family):
    """Streams behind a refitted slot are inferred, not run: each lone refit runs the model as it is by then."""
    from dropformer.metrics.blockwise.variant import Changes

    found, gone = opened(family), [Layer("attn", 1)]
    slots = all_slots(found.architecture, gone, found.slots)

    def refit(wanted, before):
        return SequentialRefit(
            found.runner, found.architecture, gone, found.groups, Changes(before), penalties=[1e-2]
        ).refit(wanted)

    at_once, one_by_one = refit(slots, {}), {}
    for slot in slots:
        one_by_one |= refit([slot], one_by_one)
    assert at_once.keys() == one_by_one.keys() and len(slots) >= 2
    for name, tensor in at_once.items():
        torch.testing.assert_close(tensor, one_by_one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_a_fit_in_sixteen_bits_is_that_of_float32_up_to_rounding(opened, family, dtype):
    gone, changes = [Layer("attn", 2)], {}
    for kind in (torch.float32, dtype):
        found = opened(family, kind)
        tensors, _ = found.independent(gap_targets(found.architecture, gone, found.slots), [0.1])
        changes[kind] = {n: t.float() - found.model.get_parameter(n).detach().float() for n, t in tensors.items()}
        assert all(t.dtype == kind for t in tensors.values())
    assert changes[dtype].keys() == changes[torch.float32].keys() != set()
    for name, change in changes[torch.float32].items():
        assert float((changes[dtype][name] - change).norm() / change.norm()) < 0.1


def test_the_dense_model_is_not_changed_by_a_repair(opened):
    found, gone = opened(), [Layer("attn", 1)]
    before = {name: p.clone() for name, p in found.model.named_parameters()}
    modules = [id(m) for m in found.model.modules()]
    slots = all_slots(found.architecture, gone, found.slots)
    SequentialRefit(found.runner, found.architecture, gone, [0, 1]).refit(slots)
    found.independent(gap_targets(found.architecture, gone, found.slots))
    assert [id(m) for m in found.model.modules()] == modules
    assert all(torch.equal(before[name], p) for name, p in found.model.named_parameters())


def mapped(found, layers, penalties):
    from dropformer.metrics.repair.base import RepairContext
    from dropformer.prune.discovery.summarize import summarize

    outline = summarize(found.model, found.architecture)
    context = RepairContext(
        found.runner, found.architecture, outline, found.groups, range(len(found.runner)), found.outputs, layers
    )
    targets = [map_target(context, layer) for layer in layers]
    tensors, _ = found.independent(targets, penalties)
    from dropformer.metrics.repair.linear import linear_forms

    maps = {}
    for layer in layers:
        prefix = found.architecture.block(layer).path + "."
        forms = linear_forms(found.model, found.architecture, layer, 32)
        maps[layer] = {name.removeprefix(prefix): form for name, form in forms.items()}
    return found.variant(layers, tensors, maps)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "granite"])
def test_the_linear_map_of_an_attention_that_is_linear_is_exact(opened, family):
    """On windows of one token attention gives its own value, a linear function of the normed input."""
    from dropformer.metrics.blockwise.runner import BlockRunner

    found = opened(family)
    found.runner = BlockRunner(found.model, found.architecture, [{"input_ids": torch.arange(3, 63)[:, None]}])
    found.groups = [0]
    repaired = mapped(found, [Layer("attn", 1), Layer("attn", 2)], [1e-6])
    with torch.inference_mode():
        expected = found.runner.run(0, 0, found.runner.start(0))
        with found.standing(repaired):
            actual = found.runner.run(0, 0, found.runner.start(0))
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi"])
def test_a_linear_map_is_closer_than_nothing(opened, family):
    found, layers = opened(family), [Layer("attn", 1), Layer("attn", 2)]
    dense = DenseReference(found.runner)
    repaired = mapped(found, layers, [1e-4])
    assert found.stream_error(repaired, dense) < found.stream_error(found.variant(layers), dense)
