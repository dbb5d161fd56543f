"""One rule for norms: after the sum of stream and branch a norm stays, whichever family puts it where."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers

from dropformer.prune.choosing import choose
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.samples.inputs import sample_inputs
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from families.tiny_models import tiny_model

BERT = {"attn": "attention.output.dense", "mlp": "output.dense"}
BART = {"attn": "self_attn.out_proj", "mlp": "fc2"}
CROSS = {**BART, "cross": "encoder_attn.out_proj"}
FUNNEL = {"attn": "attention.post_proj", "mlp": "ffn.linear_2"}
BERTS = ["bert", "roberta", "electra", "deberta", "deberta-v2", "longformer"]
BERTS += ["camembert", "convbert", "layoutlm", "roformer", "ernie", "big_bird"]
BARTS = ["bart", "fsmt", "plbart", "mvp", "marian", "blenderbot-small"]
SLOW = {*BERTS[6:], *BARTS[2:], "ibert"}  # alike in code to those before them
# Head, family, changes of its config, and by stack the last projection of each branch.
CASES = [
    *(("MaskedLM", name, {}, {"": BERT}) for name in BERTS),
    ("MaskedLM", "mpnet", {}, {"": {"attn": "attention.attn.o", "mlp": "output.dense"}}),
    ("MaskedLM", "distilbert", {}, {"": {"attn": "attention.out_lin", "mlp": "ffn.lin2"}}),
    ("MaskedLM", "albert", {}, {"": {"attn": "albert_layers.0.attention.dense", "mlp": "albert_layers.0.ffn_output"}}),
    ("MaskedLM", "ibert", {}, {"": {"mlp": "output.dense"}}),
    ("MaskedLM", "fnet", {}, {"": {"mlp": "output.dense"}}),
    ("MaskedLM", "funnel", {}, {"decoder": FUNNEL}),
    ("CausalLM", "xlnet", {}, {"": {"attn": "rel_attn.o", "mlp": "ff.layer_2"}}),
    ("CausalLM", "openai-gpt", {}, {"": {"attn": "attn.c_proj", "mlp": "mlp.c_proj"}}),
    ("CausalLM", "opt", {"do_layer_norm_before": False}, {"": BART}),
    ("CausalLM", "git", {}, {"": BERT}),
    *(("Seq2SeqLM", name, {}, {"encoder": BART, "decoder": CROSS}) for name in BARTS),
    ("Seq2SeqLM", "led", {}, {"encoder": {**BART, "attn": "self_attn.output"}, "decoder": CROSS}),
    (
        "Seq2SeqLM",
        "prophetnet",
        {},
        {
            "encoder": {"attn": "self_attn.out_proj", "mlp": "feed_forward.output"},
            "decoder": {"attn": "self_attn.out_proj", "cross": "cross_attn.out_proj", "mlp": "feed_forward.output"},
        },
    ),
]


@pytest.fixture(scope="module")
def model_of():
    made = {}

    def make(head, family, changes):
        if family not in made:
            made.clear()
            model = tiny_model(family, getattr(transformers, f"AutoModelFor{head}"), **changes)
            made[family] = model, summarize(model, discover(model))
        return made[family]

    return make


def silent(model, path):
    """A copy in which a projection gives zeros."""
    copied = copy.deepcopy(model)
    owner, _, leaf = path.rpartition(".")
    found = getattr(copied.get_submodule(owner), leaf)
    with torch.no_grad():
        for parameter in [found] if isinstance(found, torch.Tensor) else found.parameters():
            parameter.zero_()
    return copied


def samples(model):
    """A batch, and for XLNet one whose words are predicted by a stream of queries."""
    inputs = sample_inputs(model)
    yield inputs
    if model.config.model_type == "xlnet":
        rows, length = inputs["input_ids"].shape
        targets = torch.zeros(rows, 2, length)
        targets[:, 0, 1] = targets[:, 1, -1] = 1
        hidden = torch.zeros(rows, length, length)
        hidden[:, :, [1, -1]] = 1
        yield {**inputs, "target_mapping": targets, "perm_mask": hidden}


ALL = [
    pytest.param(
        *(head, family, changes, stack, kind, end),
        id=f"{family}-{stack or 'only'}-{kind}",
        marks=pytest.mark.slow if family in SLOW else (),
    )
    for head, family, changes, stacks in CASES
    for stack, ends in stacks.items()
    for kind, end in ends.items()
]


@pytest.mark.parametrize("head, family, changes, stack, kind, end", ALL)
def test_a_dropped_branch_leaves_the_norm_after_its_sum(model_of, head, family, changes, stack, kind, end):
    model, outline = model_of(head, family, changes)
    layers = choose(outline, f"{stack}.{kind}=1" if stack else f"{kind}=1")
    small = copy.deepcopy(model)
    small = apply_surgery(small, plan_surgery(outline, layers, small))
    zeroed = silent(model, f"{outline.stack(stack).path}.1.{end}")
    norms = [name for name, module in zeroed.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == sum(isinstance(module, torch.nn.LayerNorm) for module in small.modules())
    for inputs in samples(model):
        with torch.no_grad():
            got, want, dense = (m(**inputs)[0] for m in (small, zeroed, model))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["xlm", "flaubert"])
def test_families_whose_blocks_are_no_modules_are_refused(family):
    with pytest.raises(Exception, match="joined elsewhere"):
        discover(tiny_model(family, transformers.AutoModelForMaskedLM))
