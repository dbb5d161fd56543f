"""What repairs make of a model, end to end: gated, saved, seen by searches, in every family and dtype."""

from dataclasses import replace

import pytest
import torch

from dropformer.metrics.blockwise.variant import Changes, variant
from dropformer.metrics.repair import lora
from dropformer.metrics.repair.registry import REPAIRS, RepairEntry, Training
from dropformer.metrics.search.improve import improve
from dropformer.metrics.search.strategy import Strategy, Target, quality
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import PlanError
from dropformer.prune.loading.load import load
from dropformer.prune.loading.parts import replaced
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery
from dropformer.prune.surgery.views import sharing_copy

REF = ModelRef(name="tiny")


def repaired(model, plan, repair):
    pruned = sharing_copy(model)
    surgery = plan_surgery(plan.outline, plan.layers, model, repair.mapped)
    return apply_surgery(pruned, replace(surgery, tensors=repair.named(plan.outline, surgery.block_map)))


def test_healing_tells_how_far_it_is(improver):
    found, said = improver(Strategy(repair=("lora",), stride=1)), []
    found.tell = said.append
    improve(found, REF, Target("attn=1"))
    assert len(said) == 10 and said[-1] == "lora: 16 of 16 steps"  # eight windows, twice


def test_healing_trains_as_long_and_with_adapters_as_wide_as_asked(improver):
    healing = Strategy(repair=("lora",), stride=1, training=Training(epochs=3, rank=1))
    found, said = improver(healing), []
    found.tell = said.append
    _, repair, _ = improve(found, REF, Target("attn=1"))
    assert said[-1] == "lora: 24 of 24 steps"  # eight windows, three times
    name = "model.layers.2.mlp.down_proj.weight"
    change = repair.tensors[name] - found.model.get_parameter(name).detach()
    assert int(torch.linalg.matrix_rank(change, rtol=1e-3)) == 1


@pytest.mark.parametrize("method", ["lora", "distill"])
def test_what_trains_takes_a_step_for_each_window_of_a_batch_as_a_gpu_has_them(improver, method):
    one = improver(Strategy(repair=(method,), stride=1, training=Training(epochs=1)))
    many = improver(one.quality)
    windows = [inputs["input_ids"] for inputs in many.bench.runner.batches]  # eight of one window each, two domains
    pairs = [{"input_ids": torch.cat(windows[i : i + 2])} for i in range(0, 8, 2)]
    many.bench = replace(many.bench, runner=many.bench.runner.like(pairs, many.architecture))
    groups, many.groups = many.groups, many.groups[::2]
    steps = many.context([Layer("attn", 1)]).in_steps(24)
    assert len(steps.runner) == 8 and steps.groups == [groups[i // 2 * 2] for i in range(8)]
    changes = [REPAIRS[method].method()(found.context([Layer("attn", 1)])) for found in (one, many)]
    assert changes[0].tensors.keys() == changes[1].tensors.keys()
    for name, tensor in changes[0].tensors.items():  # Adam makes much of rounding, and other windows validate
        assert torch.allclose(tensor, changes[1].tensors[name], atol=5e-3 if method == "lora" else 5e-2)


def test_healing_that_runs_out_of_memory_starts_again_with_less(improver, monkeypatch):
    def step(lesson, batch, turn, real=lora.Lesson.step):
        if lesson.backward == 1 and turn == 3:  # blocks are not run again
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(lesson, batch, turn)

    healing = Strategy(repair=("lora",), stride=1)
    _, fits, _ = improve(improver(healing), REF, Target("attn=1"))
    monkeypatch.setattr(lora.Lesson, "step", step)
    found, said = improver(healing), []
    found.tell = said.append
    _, less, _ = improve(found, REF, Target("attn=1"))
    assert "lora: out of memory" in " ".join(said)
    assert all(torch.allclose(fits.tensors[name], less.tensors[name], atol=1e-5) for name in fits.tensors)


def test_what_maps_leave_is_refitted_behind_them(improver):
    _, fixed, _ = improve(improver(Strategy(repair=("linear", "refit-all"), stride=1)), REF, Target("attn=0,1"))
    refitted = {name for name in fixed.tensors if "mlp.down_proj" in name or "self_attn.o_proj" in name}
    assert refitted and min(int(name.split(".")[2]) for name in refitted) >= 0


@pytest.mark.parametrize(
    "repair", [("refit",), ("refit-all",), ("linear",), ("linear", "refit-all"), ("linear", "refit"), ("refit", "lora")]
)
def test_a_repaired_model_is_the_dense_one_with_its_stand_ins_and_survives_saving(improver, windows, tmp_path, repair):
    found = improver(Strategy(repair=repair, stride=1))
    model, before = found.model, {name: p.clone() for name, p in found.model.named_parameters()}
    plan, fixed, standing = improve(found, REF, Target("attn=1,2,mlp=1"))
    pruned = repaired(model, plan, fixed)
    with torch.no_grad(), replaced(model, standing.modules()):
        expected = model(windows).logits
    with torch.no_grad():
        torch.testing.assert_close(pruned(windows).logits, expected)
        pruned.save_pretrained(tmp_path / "saved")
        again = load(tmp_path / "saved")
        torch.testing.assert_close(again(windows).logits, expected)
        text = pruned.generate(windows[:1, :5], max_new_tokens=4, do_sample=False)
    assert text.shape == (1, 9)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_mapped_attention_holds_no_cache(improver, windows):
    found = improver(Strategy(repair=("linear",), stride=1))
    plan, fixed, _ = improve(found, REF, Target("attn=0,2"))
    pruned = repaired(found.model, plan, fixed)
    with torch.no_grad():
        whole = pruned(windows[:2]).logits
        first = pruned(windows[:2, :10], use_cache=True)
        rest = pruned(windows[:2, 10:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)
    held = [getattr(layer, "keys", None) for layer in first.past_key_values.layers]
    assert [i for i, keys in enumerate(held) if isinstance(keys, torch.Tensor) and keys.numel()] == [1, 3]


def test_a_repair_that_hurts_other_text_is_not_kept(improver):
    found = improver(Strategy(repair=("refit",), stride=1))
    _, ungated = found.repair([Layer("attn", 2)], None)
    gated, _ = found.repair([Layer("attn", 2)], found.data[0])
    assert [g.passed for g in gated.gates] == [g.after < g.before for g in gated.gates]
    assert bool(gated.tensors) == gated.gates[0].passed and ungated.tensors
    assert gated.gates[0].dense == pytest.approx(found_perplexity(found), rel=1e-3)


def found_perplexity(found):
    """The dense model's perplexity on the first two windows, at the gate's stride."""
    ids = found.data[0].ids[:2]
    with torch.no_grad():
        logits = found.model(ids).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).exp())


@pytest.mark.parametrize("repair", [("refit",), ("linear",), ("linear", "refit")])
def test_a_search_measures_a_candidate_as_it_will_be_repaired(improver, repair):
    found = improver(Strategy(select="greedy", repair=repair, stride=1, cost_windows=2))
    gone = [Layer("attn", 1), Layer("mlp", 2)]
    found.prepare(gone, 2)
    expected = found.cost(gone)
    _, standing = found.repair(gone)
    assert found.dense.compare_each([standing])[0].mean_kl == pytest.approx(expected, rel=1e-4)
    found.quality = replace(found.quality, aware=False)
    found.prepare(gone, 2)
    dropped = variant(found.model, found.architecture, gone)
    assert found.cost(gone) == pytest.approx(found.dense.compare_each([dropped])[0].mean_kl, rel=1e-4)


def test_what_a_search_fitted_is_not_fitted_again(improver):
    found = improver(Strategy(select="greedy", repair=("refit",), cost_windows=2))
    blocks = [Layer("block", i) for i in (1, 2)]
    found.prepare([Layer("block", i) for i in range(4)], 2)
    found.cost(blocks)
    spent = found.work.spent
    fixed, _ = found.repair(blocks)
    assert found.work.spent == spent and (fixed.tensors or fixed.unrepaired)


def test_nothing_is_fitted_on_the_windows_that_a_search_measures_on(improver):
    found = improver(Strategy(select="greedy", repair=("refit",), cost_windows=2))
    assert found.fitted_on == (1, 2, 3, 5, 6, 7)
    found.quality = Strategy(repair=("refit",))
    assert found.fitted_on == tuple(range(8))


@pytest.mark.parametrize("select", ["one-shot", "iterative", "greedy"])
def test_every_search_drops_what_the_spec_asks_for(improver, select):
    plan, repair, _ = improve(
        improver(Strategy(select=select, stride=1, refine=1)), REF, Target("attn:2,mlp:1", keep=(0,))
    )
    kinds = [layer.kind for layer in plan.layers]
    assert (kinds.count("attn"), kinds.count("mlp")) == (2, 1) and not repair.tensors
    assert all(layer.index != 0 for layer in plan.layers)


def test_a_budget_is_met_by_the_plan(improver):
    plan, _, _ = improve(improver(Strategy(stride=1)), REF, Target(budget="params:-15%"))
    assert plan.savings.parameters_after <= 0.85 * plan.savings.parameters
    assert plan.spec == "params:-15%"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "phi", "gptj", "mixtral", "olmo2", "qwen3_next"])
def test_the_best_quality_repairs_every_family_or_says_what_it_could_not_and_why(improver, family):
    found, said = improver(replace(quality("best"), training=Training(epochs=1)), family), []
    found.tell = said.append
    fixed, _ = found.repair([Layer("attn", 2)])
    missed = [why for _, why in fixed.unrepaired]
    assert fixed.tensors or any("experts" in why or "Moe" in why for why in missed)
    assert all(any(why in line for line in said) for why in missed)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_the_same_layers_are_chosen_and_repaired_in_sixteen_bits(improver, family):
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plan, fixed, _ = improve(improver(quality("best"), family, dtype), REF, Target("attn:2", keep=(0,)))
        found[dtype] = set(plan.layers), set(fixed.tensors)
    layers, tensors = found[torch.float32]
    assert all(others == layers for others, _ in found.values())
    assert tensors and all(others == tensors for _, others in found.values())


def test_a_repair_of_ones_own_is_one_entry(improver):
    """It halves the norm before the head of whatever block is left last; a search does not see it."""

    def halve(context):
        name = "model.layers.3.post_attention_layernorm.weight"
        return Changes({name: context.model.get_parameter(name) / 2}, unrepaired=(("attn:0", "a toy"),))

    with REPAIRS.having("halve", RepairEntry("a toy", halve), before="lora"):
        assert quality(repair="lora,halve,refit").repair == ("refit", "halve", "lora")
        found, said = improver(quality(repair="halve")), []
        found.tell = said.append
        fixed, _ = found.repair([Layer("attn", 1)])
        assert list(fixed.tensors) == ["model.layers.3.post_attention_layernorm.weight"]
        assert said == ["halve: attn:0 not repaired: a toy"]
    with pytest.raises(PlanError, match="--repair `halve` is unknown"):
        improver(Strategy(repair=("halve",)))


def test_what_was_refitted_before_a_gap_is_refitted_again_behind_an_earlier_one(improver):
    """The attention of block 2 is fitted while the MLP layer behind it, refitted already, is left out."""
    found = improver(quality(repair="refit,refit-all"))
    gone = [Layer("attn", 1), Layer("attn", 3)]
    once, _ = found.repair(gone)
    found.quality = quality(repair="refit")
    assert once.tensors and {n.split(".")[2] for n in found.repair(gone)[0].tensors} == {"0", "2"}


def test_a_variant_without_a_module_has_no_use_for_its_parts(improver):
    found = improver(quality())
    name = "model.layers.2.mlp.down_proj.weight"
    changes = Changes({name: torch.zeros_like(found.model.get_parameter(name))})
    one = variant(found.model, found.architecture, [Layer("mlp", 2)], changes)
    assert "model.layers.2.mlp" in one.modules() and "model.layers.2.mlp.down_proj" not in one.modules()


def test_passes_are_counted_by_what_runs(improver):
    """A refit of a gap behind block 1 runs blocks 0 to 2 of the dense model on all windows, and nothing else."""
    found = improver(Strategy(repair=("refit",)))
    found.repair([Layer("attn", 2)])
    assert found.work.passes == pytest.approx(3 / 4)
