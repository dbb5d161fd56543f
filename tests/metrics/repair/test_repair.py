"""Repairs are exact where they can be, and never worse on what they were fitted on."""

from dataclasses import replace

import pytest
import torch

from dropformer.metrics.blockwise.divergence import DenseReference, dropped_modules
from dropformer.metrics.blockwise.layer_metrics import MetricContext
from dropformer.metrics.blockwise.runner import BlockRunner, replaced
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.metrics.calibration.windows import Windows
from dropformer.metrics.repair.folding import GapRefits
from dropformer.metrics.repair.independent import IndependentRefit, RefitTarget
from dropformer.metrics.repair.linear import linear_modules
from dropformer.metrics.repair.projection import projections
from dropformer.metrics.repair.refit import all_slots, gap_slots, gaps, reaches
from dropformer.metrics.repair.ridge import MomentSums, error, fit, group_of, solve, token_weights
from dropformer.metrics.repair.scale import factors, growth, scale_modules
from dropformer.metrics.repair.sequential import SequentialRefit
from dropformer.metrics.search.improve import Improver, improve
from dropformer.metrics.search.strategy import Strategy, Target
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.discovery.discover import discover
from dropformer.prune.loading.load import load
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery

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
    runner = BlockRunner(model, architecture, [{"input_ids": windows[:4]}, {"input_ids": windows[4:]}])
    return model, architecture, runner


def stream_error(runner, dense, modules):
    """Relative error of the stream after the last block, weighted as the fits weigh it."""
    total = 0.0
    with torch.inference_mode(), replaced(runner.model, modules):
        for batch in range(len(runner)):
            goal = dense.streams[batch][-1]
            gap = (runner.run(0, batch, runner.start(batch)) - goal).square().sum(-1)
            total += float((gap * token_weights(goal)).sum())
    return total


def fitted(runner, architecture, gone, slots, standing, penalties, apart):
    """Slots fitted to what is gone right behind them; without `gone`, to what stood in their own place."""
    groups = [0] * len(runner)
    if not apart:
        return SequentialRefit(runner, architecture, gone, groups, dict(standing), penalties).refit(slots)
    if gone:
        wanted = reaches(architecture, gone, {slot.layer: slot for slot in slots}, len(gone)).items()
        found = [RefitTarget(slot, runner.model.get_submodule(slot.path), units) for slot, units in wanted]
    else:
        found = [RefitTarget(slot, standing[slot.path], ((slot.layer,),)) for slot in slots]
    apart = IndependentRefit(runner, found, range(len(runner)), groups, penalties)
    if gone:
        return {**standing, **GapRefits(architecture, apart).modules(gone)}
    return {**standing, **{reach.slot.path: apart.module(reach, reach.units) for reach in found}}


def test_the_solution_without_penalty_is_least_squares():
    draw = torch.Generator().manual_seed(0)
    z, r = torch.randn(50, 5, generator=draw), torch.randn(50, 3, generator=draw)
    sums = MomentSums()
    sums.add(z, [r], torch.ones(50))
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
    one, many = MomentSums(), MomentSums()
    one.add(z, [r], w)
    for i in range(6):
        many.add(z[i], [r[i]], w[i])
    torch.testing.assert_close(one.zz, many.zz, rtol=1e-5, atol=1e-5)
    assert one.rr == pytest.approx(many.rr, rel=1e-6)


def test_a_fit_that_does_not_carry_over_to_another_kind_of_text_is_no_change():
    draw = torch.Generator().manual_seed(0)
    groups = {}
    for kind, sign in enumerate((1, -1)):
        z = torch.randn(100, 4, generator=draw)
        groups[kind] = MomentSums()
        groups[kind].add(z, [sign * z], torch.ones(100))
    change, _, left_over = fit(groups)
    assert not change.any() and left_over == 1


def test_windows_that_judge_are_of_every_kind_and_choose_the_penalty():
    """More text of the same kind: the less noise an input carries over, the smaller the penalty."""
    assert [group_of(1, n) for n in range(5)] == [1, 1, 1, None, 1]
    draw = torch.Generator().manual_seed(0)
    found = {}
    for noise in (0.01, 3.0):
        groups = {0: MomentSums(), None: MomentSums()}
        for sums in groups.values():
            z = torch.randn(40, 20, generator=draw)
            sums.add(z, [z[:, :1] + noise * torch.randn(40, 1, generator=draw)], torch.ones(40))
        found[noise] = fit(groups)
    assert found[0.01][1] < found[3.0][1] and found[0.01][2] < 0.1 < found[3.0][2]


def test_sinks_weigh_their_share_and_no_more():
    stream = torch.ones(2, 50, 8)
    stream[:, 0] *= 1000
    weights = token_weights(stream, 0.1)
    assert float(weights.sum()) == pytest.approx(100, rel=1e-4)
    assert float(weights[:, 0].sum()) == pytest.approx(10, rel=1e-4)


def test_a_huge_input_does_not_make_the_penalty_of_the_others_huge():
    draw = torch.Generator().manual_seed(0)
    z, huge = torch.randn(200, 3, generator=draw), torch.randn(200, 1, generator=draw) * 1e4
    r = z @ torch.randn(3, 2, generator=draw)
    weights = []
    for inputs in (z, torch.cat([z, huge], -1)):
        sums = MomentSums()
        sums.add(inputs, [r], torch.ones(200))
        zz, zr, _ = sums.mean()
        weights.append(solve(zz, zr, 0.1)[:3])
    torch.testing.assert_close(weights[0], weights[1], rtol=0.05, atol=0.05)


def test_several_targets_add_up():
    draw = torch.Generator().manual_seed(0)
    z, one, two = (torch.randn(30, k, generator=draw) for k in (4, 2, 2))
    parts, whole = MomentSums(), MomentSums()
    parts.add(z, [one, two], torch.ones(30))
    whole.add(z, [one + two], torch.ones(30))
    for found, expected in zip(parts.mean([0, 1]), whole.mean(), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected))


def test_a_gap_belongs_to_the_last_branch_before_it(tiny):
    architecture = discover(tiny("llama"))
    gone = [Layer("attn", 0), Layer("attn", 2), Layer("block", 3)]
    assert gaps(architecture, gone) == {
        Layer("mlp", 1): [Layer("attn", 2)],
        Layer("mlp", 2): [Layer("attn", 3), Layer("mlp", 3)],
    }


def test_a_parallel_block_that_lost_a_branch_is_mended_by_its_other_branch(tiny):
    architecture = discover(tiny("gpt_neox"))
    assert gaps(architecture, [Layer("mlp", 1)]) == {Layer("attn", 1): [Layer("mlp", 1)]}
    assert gaps(architecture, [Layer("attn", 1)]) == {Layer("mlp", 1): [Layer("attn", 1)]}


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("kinds", [["attn", "mlp"], ["block"]])
def test_moments_for_all_candidates_give_the_fold_of_each_gap(tiny, windows, family, kinds):
    _, architecture, runner = opened(tiny, windows, family)
    candidates = [layer for layer in architecture.layers() if layer.kind in kinds]
    gone = [Layer("block", 1), Layer("block", 2)] if "block" in kinds else [Layer("mlp", 1), Layer("attn", 2)]
    found = []
    for asked in (candidates, gone):
        slots = reaches(architecture, asked, projections(runner), 2)
        wanted = [RefitTarget(slot, runner.model.get_submodule(slot.path), units) for slot, units in slots.items()]
        folds = GapRefits(architecture, IndependentRefit(runner, wanted, [0, 1], [0, 0], [1e-3]))
        assert folds.cover(gone, projections(runner))
        found.append(folds.modules(gone))
    assert found[0] and found[0].keys() == found[1].keys()
    for path, module in found[0].items():
        torch.testing.assert_close(module.weight, found[1][path].weight, rtol=1e-3, atol=1e-5)
        assert not torch.equal(module.weight, runner.model.get_submodule(path).weight)


def test_a_gap_deeper_than_was_prepared_for_is_not_covered(tiny, windows):
    _, architecture, runner = opened(tiny, windows)
    slots = reaches(architecture, [Layer("block", i) for i in range(4)], projections(runner), 1)
    wanted = [RefitTarget(slot, runner.model.get_submodule(slot.path), units) for slot, units in slots.items()]
    folds = GapRefits(architecture, IndependentRefit(runner, wanted, [0], [0], [1e-3]))
    assert folds.cover([Layer("block", 1), Layer("block", 3)], projections(runner))
    assert not folds.cover([Layer("block", 1), Layer("block", 2)], projections(runner))


@pytest.mark.parametrize("which", [gap_slots, all_slots])
@pytest.mark.parametrize("gone", [[Layer("attn", 2)], [Layer("block", 1)], [Layer("attn", 1), Layer("mlp", 2)]])
def test_refit_brings_the_stream_closer_on_what_it_was_fitted_on(tiny, windows, which, gone):
    _, architecture, runner = opened(tiny, windows)
    dense = DenseReference(runner)
    slots = which(architecture, gone, projections(runner))
    lockstep = SequentialRefit(runner, architecture, gone, [0, 0], penalties=[1e-4])
    repaired = lockstep.refit(slots)
    before = stream_error(runner, dense, dropped_modules(architecture, gone))
    assert stream_error(runner, dense, repaired) < before
    assert {fit.slot for fit in lockstep.fits} == set(slots)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi"])
def test_refit_works_whatever_the_family(tiny, windows, family, apart):
    fields = {"n_embd": 32, "n_layer": 4, "n_head": 4} if family == "gpt2" else {}
    _, architecture, runner = opened(tiny, windows, family, **fields)
    dense, gone = DenseReference(runner), [Layer("attn", 2)]
    slots = (gap_slots if apart else all_slots)(architecture, gone, projections(runner))
    repaired = fitted(runner, architecture, gone, slots, dropped_modules(architecture, gone), [1e-4], apart)
    assert slots and stream_error(runner, dense, repaired) < stream_error(
        runner, dense, dropped_modules(architecture, gone)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_all_slots_in_one_go_are_what_one_after_the_other_gives(tiny, windows, family):
    """Streams behind a refitted slot are inferred, not run: each lone refit runs the model as it stands."""
    fields = {"n_embd": 32, "n_layer": 4, "n_head": 4} if family == "gpt2" else {}
    _, architecture, runner = opened(tiny, windows, family, **fields)
    gone = [Layer("attn", 1)]
    slots = all_slots(architecture, gone, projections(runner))
    at_once = SequentialRefit(runner, architecture, gone, [0, 0], penalties=[1e-2]).refit(slots)
    one_by_one = {}
    for slot in slots:
        one_by_one = SequentialRefit(runner, architecture, gone, [0, 0], one_by_one, [1e-2]).refit([slot])
    assert at_once.keys() == one_by_one.keys() and len(slots) >= 2
    for slot in slots:
        torch.testing.assert_close(at_once[slot.path].weight, one_by_one[slot.path].weight, rtol=1e-3, atol=1e-4)


def test_the_dense_model_is_not_changed_by_a_repair(tiny, windows):
    model, architecture, runner = opened(tiny, windows)
    before = {name: p.clone() for name, p in model.named_parameters()}
    modules = [id(m) for m in model.modules()]
    gone = [Layer("attn", 1)]
    SequentialRefit(runner, architecture, gone, [0, 1]).refit(all_slots(architecture, gone, projections(runner)))
    assert [id(m) for m in model.modules()] == modules
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_linear_repair_of_an_attention_that_is_linear_is_exact(tiny, windows, family, apart):
    """On windows of one token attention gives its own value, a linear function of the normed input."""
    model, architecture, _ = opened(tiny, windows, family)
    runner = BlockRunner(model, architecture, [{"input_ids": torch.arange(3, 63)[:, None]}])
    layers = [Layer("attn", 1), Layer("attn", 2)]
    modules, slots = linear_modules(model, architecture, layers, 32)
    repaired = fitted(runner, architecture, [], slots, modules, TINY, apart)
    with torch.inference_mode():
        expected = runner.run(0, 0, runner.start(0))
        with replaced(model, repaired):
            torch.testing.assert_close(runner.run(0, 0, runner.start(0)), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi"])
def test_a_linear_map_is_closer_than_nothing(tiny, windows, family, apart):
    fields = {"n_embd": 32, "n_layer": 4, "n_head": 4} if family == "gpt2" else {}
    model, architecture, runner = opened(tiny, windows, family, **fields)
    dense, layers = DenseReference(runner), [Layer("attn", 1), Layer("attn", 2)]
    modules, slots = linear_modules(model, architecture, layers, 32)
    repaired = fitted(runner, architecture, [], slots, modules, [1e-4], apart)
    nothing = dropped_modules(architecture, layers)
    assert stream_error(runner, dense, repaired) < stream_error(runner, dense, nothing)


def test_scale_makes_the_stream_as_long_as_the_dense_one(tiny, windows):
    """Dropping a layer that only doubles the stream, and halving what comes behind, changes no direction."""
    _, architecture, runner = opened(tiny, windows)
    bench = MetricContext(runner, architecture, [None, None], stride=1)
    gone = [Layer("mlp", 0)]
    sizes = growth(bench)
    a = sizes[gone[0]][1] / sizes[gone[0]][0]
    found = factors(bench, gone)
    assert set(found) == {Layer(kind, i) for kind in ("attn", "mlp") for i in range(1, 4)}
    assert all(factor == pytest.approx(1 / a) for factor in found.values())


def test_folding_a_scalar_behind_a_gap_is_multiplying_the_stream_at_the_gap(tiny, windows):
    model, architecture, runner = opened(tiny, windows, rms_norm_eps=0.0)
    bench = MetricContext(runner, architecture, [None, None], stride=1)
    gone = [Layer("block", 1)]
    modules = scale_modules(bench, gone, projections(runner))
    a = 1 / factors(bench, gone)[Layer("attn", 2)]
    with torch.inference_mode():
        stream = runner.step(0, 0, runner.start(0))
        by_hand = runner.logits(0, runner.run(2, 0, a * stream))
        with replaced(model, modules):
            folded = runner.logits(0, runner.run(2, 0, stream))
    torch.testing.assert_close(folded, by_hand, rtol=1e-3, atol=1e-3)


def improver_of(tiny, windows, tmp_path, quality):
    model = strengthen(tiny("llama"))
    ref = CalibrationRef(name="ids", samples=8, length=24, seed=0, packed=True, skip_first=0, hash="0")
    ones = torch.ones_like(windows, dtype=torch.bool)
    data = [Windows(part, ones[:4], ones[:4], ref) for part in (windows[:4], windows[4:])]
    return model, Improver(model, data, quality), ModelRef(name="tiny")


def test_healing_tells_how_far_it_is(tiny, windows):
    _, improver, ref = improver_of(tiny, windows, None, Strategy(repair=("lora",), stride=1))
    said = []
    improver.tell = said.append
    improve(improver, ref, Target("attn=1"))
    assert len(said) == 10 and said[-1] == "lora: 16 of 16 steps"  # eight windows, twice


def test_what_maps_leave_is_refitted_behind_them(tiny, windows):
    _, improver, ref = improver_of(tiny, windows, None, Strategy(repair=("linear", "refit-all"), stride=1))
    _, fixed, _ = improve(improver, ref, Target("attn=1"))
    refitted = {name for name in fixed.tensors if "mlp.down_proj" in name or "self_attn.o_proj" in name}
    assert refitted and min(int(name.split(".")[2]) for name in refitted) >= 1


@pytest.mark.parametrize(
    "repair",
    [
        ("refit",),
        ("refit-all",),
        ("linear",),
        ("scale",),
        ("linear", "refit-all"),
        ("linear", "refit"),
        ("refit", "lora"),
    ],
)
def test_a_repaired_model_is_the_dense_one_with_its_stand_ins_and_survives_saving(tiny, windows, tmp_path, repair):
    model, improver, ref = improver_of(tiny, windows, tmp_path, Strategy(repair=repair, stride=1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan, fixed, modules = improve(improver, ref, Target("attn=1,2,mlp=1"))
    pruned = repaired(model, plan, fixed)
    with torch.no_grad(), replaced(model, modules):
        expected = model(windows).logits
    with torch.no_grad():
        torch.testing.assert_close(pruned(windows).logits, expected)
        pruned.save_pretrained(tmp_path / "saved")
        again = load(tmp_path / "saved")
        torch.testing.assert_close(again(windows).logits, expected)
        text = pruned.generate(windows[:1, :5], max_new_tokens=4, do_sample=False)
    assert text.shape == (1, 9)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_mapped_attention_holds_no_cache(tiny, windows, tmp_path):
    model, improver, ref = improver_of(tiny, windows, tmp_path, Strategy(repair=("linear",), stride=1))
    plan, fixed, _ = improve(improver, ref, Target("attn=0,2"))
    pruned = repaired(model, plan, fixed)
    with torch.no_grad():
        whole = pruned(windows[:2]).logits
        first = pruned(windows[:2, :10], use_cache=True)
        rest = pruned(windows[:2, 10:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)
    held = [getattr(layer, "keys", None) for layer in first.past_key_values.layers]
    assert [i for i, keys in enumerate(held) if isinstance(keys, torch.Tensor) and keys.numel()] == [1, 3]


def test_a_repair_that_hurts_other_text_is_not_kept(tiny, windows):
    _, improver, _ = improver_of(tiny, windows, None, Strategy(repair=("refit",), stride=1))
    same = improver.data[0]
    _, modules = improver.repair([Layer("attn", 2)], None)
    good, _ = improver.repair([Layer("attn", 2)], same)
    assert [g.passed for g in good.gates] == [g.after < g.before for g in good.gates]
    assert bool(good.tensors) == good.gates[0].passed
    assert any(True for module in modules.values() for _ in module.parameters())


@pytest.mark.parametrize("repair", [("refit",), ("linear",), ("linear", "refit")])
def test_a_search_measures_a_candidate_as_it_will_be_repaired(tiny, windows, repair):
    _, improver, _ = improver_of(
        tiny, windows, None, Strategy(select="greedy", repair=repair, stride=1, cost_windows=2)
    )
    gone = [Layer("attn", 1), Layer("mlp", 2)]
    expected = improver.cost(gone)
    _, modules = improver.repair(gone)
    with replaced(improver.model, modules):
        assert improver.cost.dense.compare(0).mean_kl == pytest.approx(expected, rel=1e-4)
    improver.quality = Strategy(select="greedy", repair=repair, aware=False, stride=1, cost_windows=2)
    with replaced(improver.model, dropped_modules(improver.architecture, gone)):
        assert improver.cost(gone) == pytest.approx(improver.cost.dense.compare(0).mean_kl, rel=1e-4)


def test_a_search_over_deep_gaps_takes_no_further_pass(tiny, windows, monkeypatch):
    from dropformer.metrics.repair.base import cache as module

    passes = []
    monkeypatch.setattr(module, "Apart", lambda *args: passes.append(args) or IndependentRefit(*args))
    _, improver, _ = improver_of(tiny, windows, None, Strategy(select="greedy", repair=("refit",), cost_windows=2))
    improver.prepare([Layer("block", i) for i in range(4)], 3)
    improver.cost([Layer("block", 1), Layer("block", 2), Layer("block", 3)])
    assert len(passes) == 1
    improver.repair([Layer("block", 1), Layer("block", 2), Layer("block", 3)])
    assert len(passes) == 2


def test_nothing_is_fitted_on_the_windows_that_a_search_measures_on(tiny, windows):
    _, improver, _ = improver_of(tiny, windows, None, Strategy(select="greedy", repair=("refit",), cost_windows=2))
    assert improver.fitted_on == (1, 2, 3, 5, 6, 7)
    improver.quality = Strategy(repair=("refit",))
    assert improver.fitted_on == tuple(range(8))


@pytest.mark.parametrize("select", ["one-shot", "iterative", "greedy"])
def test_every_search_drops_what_the_spec_asks_for(tiny, windows, select):
    _, improver, ref = improver_of(tiny, windows, None, Strategy(select=select, stride=1, refine=1))
    plan, repair, _ = improve(improver, ref, Target("attn:2,mlp:1", keep=(0,)))
    kinds = [layer.kind for layer in plan.layers]
    assert (kinds.count("attn"), kinds.count("mlp")) == (2, 1) and not repair.tensors
    assert all(layer.index != 0 for layer in plan.layers)


def test_a_budget_is_met_by_the_plan(tiny, windows):
    _, improver, ref = improver_of(tiny, windows, None, Strategy(stride=1))
    plan, _, _ = improve(improver, ref, Target(budget="params:-15%"))
    assert plan.savings.parameters_after <= 0.85 * plan.savings.parameters
    assert plan.spec == "params:-15%"


def repaired(model, plan, repair):
    from dropformer.prune.surgery.views import sharing_copy

    pruned = sharing_copy(model)
    surgery = plan_surgery(plan.outline, plan.layers, model, repair.mapped)
    return apply_surgery(pruned, replace(surgery, tensors=repair.named(plan.outline, surgery.block_map)))
