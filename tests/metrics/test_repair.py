"""Repairs are exact where they can be, and never worse on what they were fitted on."""

import pytest
import torch

from dropformer import api
from dropformer.metrics.damage import Dense, dropped_modules
from dropformer.metrics.lockstep import Lockstep
from dropformer.metrics.projection import projections
from dropformer.metrics.repair_linear import linear_modules
from dropformer.metrics.repair_refit import all_slots, gap_slots
from dropformer.metrics.ridge import Sums, error, fit, solve, token_weights
from dropformer.metrics.stepping import Stepper, replaced
from dropformer.prune.architecture import Layer
from dropformer.prune.discover import discover

TINY = [1e-6]


@pytest.fixture
def windows():
    return torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(3))


def strengthen(model):
    """A random model's branches add almost nothing: make them matter."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embed" not in name:
                p *= 6
    return model


def opened(tiny, windows, family="llama", **fields):
    model = strengthen(tiny(family, **fields))
    architecture = discover(model)
    stepper = Stepper(model, architecture, [{"input_ids": windows[:4]}, {"input_ids": windows[4:]}])
    return model, architecture, stepper


def stream_error(stepper, dense, modules):
    """Relative error of the stream after the last block, weighted as the fits weigh it."""
    total = 0.0
    with torch.inference_mode(), replaced(stepper.model, modules):
        for batch in range(len(stepper)):
            goal = dense.streams[batch][-1]
            gap = (stepper.run(0, batch, stepper.start(batch)) - goal).square().sum(-1)
            total += float((gap * token_weights(goal)).sum())
    return total


def test_the_solution_without_penalty_is_least_squares():
    draw = torch.Generator().manual_seed(0)
    z, r = torch.randn(50, 5, generator=draw), torch.randn(50, 3, generator=draw)
    sums = Sums()
    sums.add(z, r, torch.ones(50))
    zz, zr, rr = sums.mean()
    w = solve(zz, zr, 1e-12)
    torch.testing.assert_close(w.float(), torch.linalg.lstsq(z, r).solution, rtol=1e-4, atol=1e-5)
    assert error(zz, zr, rr, w) == pytest.approx(float((r - z @ w.float()).square().sum() / r.square().sum()), abs=1e-5)


def test_sums_do_not_depend_on_how_the_windows_are_split():
    draw = torch.Generator().manual_seed(0)
    z, r, w = (
        torch.randn(6, 7, 5, generator=draw),
        torch.randn(6, 7, 3, generator=draw),
        torch.rand(6, 7, generator=draw),
    )
    one, many = Sums(), Sums()
    one.add(z, r, w)
    for i in range(6):
        many.add(z[i], r[i], w[i])
    torch.testing.assert_close(one.zz, many.zz, rtol=1e-5, atol=1e-5)
    assert one.rr == pytest.approx(many.rr, rel=1e-6)


def test_a_fit_that_does_not_carry_over_to_another_kind_of_text_is_no_change():
    draw = torch.Generator().manual_seed(0)
    groups = []
    for sign in (1, -1):
        z = torch.randn(100, 4, generator=draw)
        groups.append(Sums())
        groups[-1].add(z, sign * z, torch.ones(100))
    change, _, left_over = fit(groups)
    assert not change.any() and left_over == 1


def test_sinks_weigh_their_share_and_no_more():
    stream = torch.ones(2, 50, 8)
    stream[:, 0] *= 1000
    weights = token_weights(stream, 0.1)
    assert float(weights.sum()) == pytest.approx(100, rel=1e-4)
    assert float(weights[:, 0].sum()) == pytest.approx(10, rel=1e-4)


@pytest.mark.parametrize("which", [gap_slots, all_slots])
@pytest.mark.parametrize("gone", [[Layer("attn", 2)], [Layer("block", 1)], [Layer("attn", 1), Layer("mlp", 2)]])
def test_refit_brings_the_stream_closer_on_what_it_was_fitted_on(tiny, windows, which, gone):
    _, architecture, stepper = opened(tiny, windows)
    dense = Dense(stepper)
    slots = which(architecture, gone, projections(stepper))
    lockstep = Lockstep(stepper, architecture, gone, [0, 0], penalties=[1e-4])
    repaired = lockstep.refit(slots)
    before = stream_error(stepper, dense, dropped_modules(architecture, gone))
    assert stream_error(stepper, dense, repaired) < before
    assert {fit.slot for fit in lockstep.fits} == set(slots)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi"])
def test_refit_works_whatever_the_family(tiny, windows, family):
    fields = {"n_embd": 32, "n_layer": 4, "n_head": 4} if family == "gpt2" else {}
    _, architecture, stepper = opened(tiny, windows, family, **fields)
    dense, gone = Dense(stepper), [Layer("attn", 2)]
    slots = all_slots(architecture, gone, projections(stepper))
    repaired = Lockstep(stepper, architecture, gone, [0, 0], penalties=[1e-4]).refit(slots)
    assert slots and stream_error(stepper, dense, repaired) < stream_error(
        stepper, dense, dropped_modules(architecture, gone)
    )


def test_the_dense_model_is_not_changed_by_a_repair(tiny, windows):
    model, architecture, stepper = opened(tiny, windows)
    before = {name: p.clone() for name, p in model.named_parameters()}
    modules = [id(m) for m in model.modules()]
    gone = [Layer("attn", 1)]
    Lockstep(stepper, architecture, gone, [0, 1]).refit(all_slots(architecture, gone, projections(stepper)))
    assert [id(m) for m in model.modules()] == modules
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_linear_repair_of_an_attention_that_is_linear_is_exact(tiny, windows, family):
    """On windows of one token attention gives its own value, a linear function of the normed input."""
    model, architecture, _ = opened(tiny, windows, family)
    stepper = Stepper(model, architecture, [{"input_ids": torch.arange(3, 63)[:, None]}])
    layers = [Layer("attn", 1), Layer("attn", 2)]
    modules, slots = linear_modules(model, architecture, layers, 32)
    repaired = Lockstep(stepper, architecture, [], [0], modules, TINY).refit(slots)
    with torch.inference_mode():
        expected = stepper.run(0, 0, stepper.start(0))
        with replaced(model, repaired):
            torch.testing.assert_close(stepper.run(0, 0, stepper.start(0)), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi"])
def test_a_linear_map_is_closer_than_nothing(tiny, windows, family):
    fields = {"n_embd": 32, "n_layer": 4, "n_head": 4} if family == "gpt2" else {}
    model, architecture, stepper = opened(tiny, windows, family, **fields)
    dense, layers = Dense(stepper), [Layer("attn", 1), Layer("attn", 2)]
    modules, slots = linear_modules(model, architecture, layers, 32)
    repaired = Lockstep(stepper, architecture, [], [0, 0], modules, [1e-4]).refit(slots)
    nothing = dropped_modules(architecture, layers)
    assert stream_error(stepper, dense, repaired) < stream_error(stepper, dense, nothing)


def plan_of(model, spec):
    from dropformer.prune.artifact import ModelRef

    return api.plan_unscored(ModelRef(name="tiny"), api.outline(model), spec, (), None)
