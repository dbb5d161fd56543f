from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from dropformer.eval.cost.counting import cost_of
from dropformer.eval.cost.speed import PAPER, Quartiles, Setting, bounds, grid, measure, quick
from dropformer.prune.errors import EvaluationError


class Nothing(nn.Module):
    def forward(self, hidden_states, **_):
        return torch.zeros_like(hidden_states), None


def llama(*dropped, layers=4):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    for index in dropped:
        model.model.layers[index].self_attn = Nothing()
        model.model.layers[index].input_layernorm = nn.Identity()
    return model


def test_a_grid_has_every_batch_with_every_prompt():
    assert len(grid([1, 2], [8, 16, 32], new=4)) == 6
    assert Setting(16, 4, 2) in grid([1, 2], [8, 16, 32], new=4)


def test_the_papers_setting_has_its_name():
    assert (PAPER.prompt, PAPER.new, PAPER.batch) == (2048, 2048, "max")


def test_a_batch_of_max_is_refused_without_a_gpu():
    with pytest.raises(EvaluationError, match="not on one"):
        measure({"dense": llama()}, [PAPER])


def test_a_compiled_model_decodes_into_one_static_cache_reset_before_each_run(monkeypatch):
    made = []
    monkeypatch.setattr(
        "dropformer.eval.cost.timing.StaticCache", lambda **kw: made.append(StaticCache(**kw)) or made[-1]
    )
    monkeypatch.setattr("dropformer.eval.cost.speed.decoder", lambda model, compile: model)  # eager: no compiler needed
    table = measure({"dense": llama(), "pruned": llama(1)}, [Setting(8, 3)], repeats=3, compile=True)
    assert len(made) == 2  # one a model, for a warm-up and three repeats
    assert all(cache.get_seq_length() == 8 + 3 for cache in made)  # of the last run alone
    assert [row.repeats for row in table.rows] == [3, 3]


def test_a_largest_batch_that_does_not_fit_after_all_is_made_smaller(monkeypatch):
    from dropformer.eval.cost import speed

    def run(model, setting, step, cache):
        if setting.batch > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return timed(model, setting, step, cache)

    timed = speed.time_run
    monkeypatch.setattr(speed, "time_run", run)
    monkeypatch.setattr(speed, "with_batch", lambda models, setting, static: replace(setting, batch=8))
    assert measure({"dense": llama()}, [Setting(8, 2, "max")], repeats=1).rows[0].setting.batch == 5  # 8, 7, 6, 5
    with pytest.raises(torch.OutOfMemoryError):
        measure({"dense": llama()}, [Setting(8, 2, 8)], repeats=1)  # a number that was asked for is not changed


def test_an_empty_grid_is_refused():
    with pytest.raises(EvaluationError, match="nothing to measure"):
        measure({"dense": llama()}, [])


def test_every_model_is_measured_at_every_setting():
    models = {"dense": llama(), "pruned": llama(1, 2)}
    table = measure(models, grid([1, 2], [8], new=3), repeats=2)
    assert [(row.model, row.setting.batch) for row in table.rows] == [
        ("dense", 1), ("pruned", 1), ("dense", 2), ("pruned", 2),
    ]  # fmt: skip
    dense, pruned = table.row("dense"), table.row("pruned", Setting(8, 3, 2))
    assert dense.decode_ratio == Quartiles(1, 1, 1)
    assert dense.kv_bytes == 4 * 128 * (8 + 3)
    assert pruned.kv_bytes == 2 * 2 * 128 * (8 + 3)
    assert pruned.prefill.median > 0
    assert pruned.peak.source
    assert "pruned" in str(table)


def test_each_repeat_starts_with_another_model():
    order = []

    class Logged(LlamaForCausalLM):
        def forward(self, **inputs):
            if inputs["input_ids"].shape[1] == 5:
                order.append(self.name)
            return super().forward(**inputs)

    models = {}
    for name in "abc":
        models[name] = Logged(llama(layers=1).config).eval()
        models[name].name = name
    measure(models, [Setting(prompt=5, new=1)], repeats=3)
    assert "".join(order) == "abc" + "abcbcacab"  # the warm-up first


class Clock:
    """A clock that only models move, so that a busy machine cannot fail a test of what is attributed to what."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    process_time = perf_counter


class Ticking(nn.Module):
    """An MLP that takes `prefill` seconds per token when it reads many, `decode` when it reads one."""

    def __init__(self, inner, clock, prefill, decode):
        super().__init__()
        self.inner, self.clock, self.prefill, self.decode = inner, clock, prefill, decode

    def forward(self, hidden_states):
        tokens = hidden_states.shape[1]
        self.clock.now += self.decode if tokens == 1 else tokens * self.prefill
        return self.inner(hidden_states)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("dropformer.eval.cost.timing.time", clock)
    monkeypatch.setattr("dropformer.eval.cost.speed.time", clock)
    return clock


def ticking(clock, prefill, decode):
    model = llama()
    model.model.layers[0].mlp = Ticking(model.model.layers[0].mlp, clock, prefill, decode)
    return model


def test_prefill_and_decode_are_timed_apart(clock):
    models = {"slow": ticking(clock, 0.01, 0.5), "fast": ticking(clock, 0.02, 0.125)}
    table = measure(models, [Setting(prompt=16, new=4, batch=2)], repeats=3)
    slow, fast = table.row("slow"), table.row("fast")
    assert (slow.prefill.median, slow.decode.median) == pytest.approx((2 / 0.01, 2 / 0.5))
    assert fast.prefill_ratio.median == pytest.approx(0.5)
    assert fast.decode_ratio.median == fast.decode_cpu_ratio.median == pytest.approx(4)
    assert fast.decode_ratio.spread == pytest.approx(0)


def test_quick_takes_what_its_budget_allows(clock):
    models = {"dense": ticking(clock, 0.02, 0.1), "pruned": ticking(clock, 0.01, 0.05)}
    table = quick(models, seconds=18)
    assert 12 < clock.now < 18 * 1.2
    assert table.row("pruned").setting.prompt > 50
    assert table.row("pruned").setting.new > 15
    assert table.row("pruned").repeats == 3


def test_quick_stops_early_on_a_machine_that_slowed_down(clock):
    model = ticking(clock, 0.01, 0.05)
    trial, seen = model.model.layers[0].mlp, []
    trial.register_forward_hook(lambda *_: seen.append(1) or setattr(trial, "decode", 0.05 if len(seen) < 8 else 1.0))
    assert quick({"dense": model}, seconds=10).row("dense").repeats == 1


def test_the_bound_of_decode_is_the_ratio_of_bytes_read():
    dense, pruned = cost_of(llama()), cost_of(llama(1, 2))
    attention = 32 * 32 * 2 + 2 * 32 * 16 + 32
    read = dense.parameters - 64 * 32  # untied: the embedding is only looked up
    _, decode = bounds(dense, pruned, Setting(prompt=96, new=8, batch=3))
    assert decode == pytest.approx((read + 3 * 100 * 4 * 32) / (read - 2 * attention + 3 * 100 * 2 * 32))


def test_the_bound_of_prefill_grows_with_the_context():
    dense, pruned = cost_of(llama()), cost_of(llama(1, 2))
    short, long = (bounds(dense, pruned, Setting(prompt, 1))[0] for prompt in (16, 4096))
    assert 1 < short < long < 2


def test_no_repeat_is_started_after_the_time_is_up():
    table = measure({"dense": llama(layers=1)}, [Setting(8, 1)], repeats=50, seconds=0)
    assert table.row("dense").repeats == 1
