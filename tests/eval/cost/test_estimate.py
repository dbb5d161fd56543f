import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dropformer.eval.cost.counting import cost_of_config
from dropformer.eval.cost.estimate import cost_of_name, estimate, estimate_lines, published_speedup, shipped_cost
from dropformer.eval.cost.hardware import HARDWARE, hardware, measure_cpu
from dropformer.eval.cost.memory import kv_bytes, parameter_bytes
from dropformer.eval.cost.roofline import KERNELS, LAUNCHES, Workload
from dropformer.prune.errors import ArchitectureError, EvaluationError, ModelError, PlanError
from dropformer.recipes import recipe, recipes

SMALL = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPU = HARDWARE["a6000"]


@cache
def cost(name):
    return cost_of_config(recipe(name).config)


def generation(config, spec, context, batch, kernels):
    return estimate(config, spec, GPU, Workload(context, batch)).speedup(kernels).generation


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-13b", 13_015_864_320), ("llama-2-70b", 68_976_648_192), ("llama-3-8b", 8_030_261_248)],
)
def test_parameters_are_those_of_the_published_checkpoint(name, parameters):
    assert cost(name).parameters == parameters


def test_bytes_are_those_of_the_model_that_the_config_builds():
    torch.manual_seed(0)
    values = {key: value for key, value in SMALL.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values)).eval()
    side = estimate(SMALL, "", GPU, Workload(context=20, batch=3, dtype="float32")).dense
    with torch.inference_mode():
        cache = model(torch.ones(3, 20, dtype=torch.long), use_cache=True).past_key_values
    assert side.checkpoint_bytes == parameter_bytes(model)
    assert side.kv_bytes == kv_bytes(cache)


def test_dropping_nothing_speeds_nothing_up():
    result = estimate(SMALL, "", GPU)
    for kernels in KERNELS:
        assert vars(result.speedup(kernels)) == {"prefill": 1, "decode": 1, "generation": 1}


def test_half_of_equal_blocks_is_half_of_the_time_where_blocks_are_all():
    config = dict(SMALL, hidden_size=2048, intermediate_size=4096, num_hidden_layers=8)
    assert generation(config, "block:4", 4096, 1, "fused") == pytest.approx(2, rel=0.01)


def test_longer_contexts_gain_more_from_dropping_attention():
    config = cost("llama-2-13b")
    gains = [generation(config, "attn:8", context, 4, "fused") for context in (512, 4096, 32768)]
    assert gains == sorted(gains)
    assert gains[-1] - gains[0] > 0.05


def test_wasteful_kernels_gain_more_from_dropping_attention():
    gains = [generation(cost("mistral-7b"), "attn:8", 4096, 8, name) for name in ("fused", "sdpa", "eager")]
    assert gains[0] < gains[1] < gains[2]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("mistral-7b", "attn:8"),
        ("mistral-7b", "attn:12"),
        ("llama-2-70b", "attn:32"),
        ("llama-2-70b", "attn:40"),
        ("llama-2-13b", "block:8"),
    ],
)
def test_eager_kernels_at_batch_8_predict_the_published_speedups_within_5_percent(name, spec):
    measured = published_speedup(recipe(name), spec)
    assert generation(cost(name), spec, 4096, 8, "eager") == pytest.approx(measured, rel=0.05)


def test_a_spec_that_was_not_published_has_no_speedup():
    assert published_speedup(recipe("mistral-7b"), "attn:9") is None
    assert published_speedup(None, "attn:8") is None


def test_a_model_too_large_for_one_device_asks_for_more():
    assert estimate(cost("llama-2-70b"), "attn:40", GPU).dense.devices == 3
    assert estimate(SMALL, "attn:1", GPU).dense.devices == 1


def test_a_mixture_reads_fewer_experts_than_it_has_at_small_batches():
    config = dict(SMALL, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, hidden_size=512)
    result = estimate(config, "mlp:2", GPU, Workload(64, 1))
    assert result.dense.active_parameters < result.dense.parameters
    assert result.speedup().decode < result.dense.parameters / result.pruned.parameters


def test_a_report_holds_plain_numbers():
    report = estimate(SMALL, "attn=1", GPU).as_dict()
    assert report["speedup"]["eager"]["decode"] > 1
    assert report["dense"]["parameters"] > report["pruned"]["parameters"]
    assert set(report["seconds"]["dense"]) == set(KERNELS)


def test_the_published_speedup_stands_below_the_predictions():
    lines = estimate_lines(estimate(cost("mistral-7b"), "attn:8", GPU, Workload(4096, 8)), published=1.23)
    assert lines[-1].strip() == "published, measured: 1.23x"
    assert any("7.242 G" in line and "6.906 G" in line for line in lines)
    assert any("eager" in line and "1.23x" in line for line in lines)
    assert not any(line.startswith("active") for line in lines)


def test_a_gpu_waits_for_the_host_where_kernels_are_short_and_the_estimate_says_so():
    """A model of microseconds a step is as fast as transformers launches it; a CUDA graph is not bound by that."""
    result = estimate(SMALL, "attn:1", GPU, Workload(64, 1))
    attention, mlp = GPU.launch * LAUNCHES["attention"], GPU.launch * LAUNCHES["mlp"]
    blocks = SMALL["num_hidden_layers"]
    assert result.dense.times["sdpa"].decode == pytest.approx(32 * blocks * (attention + mlp))
    assert result.speedup("sdpa").decode == pytest.approx(1 / (1 - attention / blocks / (attention + mlp)))
    assert result.dense.times["fused"].decode < result.dense.times["sdpa"].decode / 10
    assert any("to launch a decode step" in line for line in estimate_lines(result))
    large = estimate(cost("llama-2-13b"), "attn:8", GPU, Workload(4096, 8))
    assert not any("to launch" in line for line in estimate_lines(large))


def test_active_parameters_are_shown_for_a_mixture_only():
    config = dict(SMALL, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    assert any(line.startswith("active") for line in estimate_lines(estimate(config, "mlp:2", GPU)))


def test_what_cannot_be_estimated_is_refused_in_one_line():
    with pytest.raises(EvaluationError, match="unknown hardware"):
        hardware("abacus")
    with pytest.raises(EvaluationError, match="new tokens"):
        Workload(context=16, new_tokens=16)
    with pytest.raises(EvaluationError, match="unknown dtype `int4`"):
        Workload(dtype="int4")
    with pytest.raises(ModelError, match="causal language model"):
        estimate({"model_type": "vit"}, "attn:1", GPU)
    with pytest.raises(ArchitectureError, match="several streams"):
        estimate({"model_type": "gemma3n_text"}, "attn:1", GPU)
    for spec, says in (("attn=9", "attn=9"), ("attn:5", "ask for fewer"), ("published:attn:8", "needs a recipe")):
        with pytest.raises(PlanError, match=says):
            estimate(SMALL, spec, GPU)
    for everything in ("attn:4", "block:4"):
        with pytest.raises(PlanError, match="every attention layer"):
            estimate(SMALL, everything, GPU)


def test_a_spec_is_read_as_a_plan_reads_it():
    by_count = estimate(SMALL, "attn:50%", GPU).pruned.parameters
    assert by_count == estimate(SMALL, "attn=1,2", GPU).pruned.parameters
    joint = estimate(SMALL, "joint:4", GPU).pruned.parameters
    assert joint == estimate(SMALL, "attn:2,mlp:2", GPU).pruned.parameters


def test_a_published_list_is_estimated_as_it_stands():
    known = recipe("mistral-7b")
    listed = estimate(cost(known.name), "published:attn:8", GPU, published=known.published)
    assert listed.pruned.parameters == estimate(cost(known.name), "attn:8", GPU).pruned.parameters


def test_a_kept_cost_is_the_counted_one(llama_folder, here, monkeypatch):
    first = cost_of_name(str(llama_folder))
    monkeypatch.setattr("dropformer.eval.cost.counting.cost_of_config", None)
    assert cost_of_name(str(llama_folder)) == first
    assert cost_of_name(str(llama_folder)).outline == first.outline
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(TypeError):  # another config is counted anew
        cost_of_name(str(llama_folder))


def test_a_recipes_estimate_and_a_second_one_import_neither_torch_nor_transformers(llama_folder, tmp_path):
    code = """import sys
from dropformer.cli import app
try:
    app(["estimate", sys.argv[1], "--drop", "attn:1"])
except SystemExit as end:
    assert not end.code
print([name for name in ("torch", "transformers", "lm_eval", "datasets", "matplotlib") if name in sys.modules])
"""
    env = {**os.environ, "DROPFORMER_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    first, second, recipes_own = (
        subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, env=env, check=True).stdout
        for name in (str(llama_folder), str(llama_folder), "mistral-7b")
    )
    assert first.splitlines()[:-1] == second.splitlines()[:-1]
    assert first.splitlines()[-1] == "['torch', 'transformers']"
    assert second.splitlines()[-1] == recipes_own.splitlines()[-1] == "[]"


def test_this_machine_is_measured_in_plausible_units():
    here = measure_cpu()
    assert 1e9 < here.flops < 1e14
    assert 1e8 < here.bandwidth < 1e13
    assert 0 < here.launch < 1e-3
    assert here.seconds(here.flops, 0) == pytest.approx(1)


def test_the_costs_that_come_with_the_package_are_those_of_every_recipes_config():
    held = {name: recipe.config for name, recipe in recipes().items() if recipe.config}
    assert held and all(shipped_cost(name, config) for name, config in held.items())
    assert shipped_cost("llama-3-8b", {**held["llama-3-8b"], "num_hidden_layers": 3}) is None


@pytest.mark.parametrize(
    "name",
    [
        "smollm2-135m",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-2-70b", "qwen2.5-7b", "pythia-1b")),
    ],
)
def test_a_cost_that_comes_with_the_package_is_what_counting_gives(name):
    config = dict(recipes()[name].config)
    assert shipped_cost(name, config) == cost_of_config(config)
