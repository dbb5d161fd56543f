"""Zeros in what a branch writes by silence it in every family, and nothing else of it becomes zero."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from dropformer.prune.architecture import Layer
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import PlanError
from dropformer.prune.loading.described import meta_model
from dropformer.prune.surgery.writers import writers

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from families.tiny_models import tiny_model
from families.trial import outputs, silenced

from dropformer.prune.samples.inputs import sample_inputs

CAUSAL = "llama gpt2 mixtral qwen2_moe gpt_oss gemma2 bloom falcon deepseek_v3 xlnet mamba jamba phi3 gpt_neox"
CASES = [("CausalLM", name) for name in CAUSAL.split()]
CASES += [("MaskedLM", "bert"), ("MaskedLM", "deberta-v2"), ("ImageClassification", "vit"), ("Seq2SeqLM", "t5")]
SMALL = ("norm", "ln_", "scale", "q_proj", "k_proj", "router", "gate.weight", "gate_proj")  # never an end of a branch


@pytest.mark.parametrize("head, family", CASES)
def test_zeros_in_the_writers_silence_each_branch_and_leave_norms_queries_and_gates(head, family):
    model = tiny_model(family, getattr(transformers, f"AutoModelFor{head}"))
    architecture, blank = discover(model), meta_model(type(model), copy.deepcopy(model.config))
    outline, given = summarize(model, architecture), sample_inputs(model)
    for stack in architecture.stacks:
        block = stack.blocks[-1]
        for branch in block.branches:
            layer = Layer(branch.kind, block.index, stack.name)
            names = writers(blank, outline, [layer])
            assert names and not [name for name in names for part in SMALL if part in name]
            zeroed = copy.deepcopy(model)
            with torch.no_grad():
                for name in names:
                    zeroed.get_parameter(name).zero_()
            with silenced(model, architecture, [layer]):
                want = outputs(model, given)
            assert torch.equal(outputs(zeroed, given), want), layer


def test_weights_that_a_layer_that_stays_shares_are_not_zeroed():
    model = tiny_model("llama")
    outline = summarize(model, discover(model))
    model.model.layers[2].self_attn.o_proj = model.model.layers[1].self_attn.o_proj
    with pytest.raises(PlanError, match=r"layers.2.self_attn.o_proj.weight shares its weights"):
        writers(model, outline, [Layer("attn", 1)])
    assert len(writers(model, outline, [Layer("attn", 1), Layer("attn", 2)])) == 2


def test_a_branch_that_no_zeros_silence_is_refused_by_name():
    model = tiny_model("llama")
    outline = summarize(model, discover(model))
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj, nn.Sigmoid())
    with pytest.raises(PlanError, match="silence mlp:1"):
        writers(model, outline, [Layer("mlp", 1)])
