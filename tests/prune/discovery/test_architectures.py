"""A representative choice of docs/architectures.md: the same trial, in every run of the tests."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import dropformer
from dropformer import api
from dropformer.prune.discovery.discover import discover
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.samples.inputs import longest_text, sample_inputs
from dropformer.prune.samples.modalities import with_images
from dropformer.prune.surgery.config import pruned_config

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from families.tiny_models import tiny_model
from families.trial import SILENT, through

CAUSAL = """llama mistral mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 falcon gpt2 gpt_neox opt bloom olmo2
cohere deepseek_v3 minimax jamba"""
OTHERS = {
    "MaskedLM": "bert roberta distilbert electra deberta-v2 longformer big_bird funnel",
    "SequenceClassification": "xlnet bert",
    "PreTraining": "electra",
    "Seq2SeqLM": "t5 bart marian",
    "ImageClassification": "vit swin",
    "ImageTextToText": "llava gemma3",
}


@pytest.mark.parametrize("family", CAUSAL.split())
def test_dropping_is_silencing_and_cached_is_uncached_and_reloading_is_memory(family, tmp_path):
    said = through(tiny_model(family), tmp_path)
    assert "no cached generation" not in said and SILENT not in said
    assert all(f"{kind}=" in said for kind in ("attn", "mlp", "block"))


@pytest.mark.parametrize("head, family", [(head, name) for head, names in OTHERS.items() for name in names.split()])
def test_the_same_holds_with_any_head(head, family, tmp_path):
    auto = f"AutoModelFor{head}"
    said = through(tiny_model(family, getattr(transformers, auto)), tmp_path, auto)
    assert "no cached generation" not in said and SILENT not in said
    assert ("decoder.cross=" in said) == (head == "Seq2SeqLM")
    assert ("vision.attn=" in said) == (head == "ImageTextToText")


@pytest.mark.parametrize(
    "family, changes, says",
    [
        ("albert", {"num_hidden_groups": 1}, r"runs 4 times a pass with the same weights.*num_hidden_layers"),
        ("xlm", {}, "joined elsewhere"),
    ],
)
def test_what_an_architecture_forbids_is_said_in_a_line(family, changes, says):
    model = tiny_model(family, transformers.AutoModelForMaskedLM, **changes)
    with pytest.raises(ArchitectureError, match=says) as error:
        discover(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["bart", "umt5"])
def test_an_encoder_decoder_counts_its_text_without_the_first_attentions(family, tmp_path):
    """Greedy and beams, padded and not: positions come from the first entry of the decoder's cache."""
    model = tiny_model(family, transformers.AutoModelForSeq2SeqLM)
    spec = "decoder.attn=0,2,decoder.cross=0,1"
    api.save(api.drop(model, api.plan_unscored(mine(), api.outline(model), spec, (), None)), tmp_path / "out")
    pruned = dropformer.load(tmp_path / "out")
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids).masked_fill(torch.arange(9) < torch.tensor([[0], [4]]), 0)
    say = {"max_new_tokens": 6, "do_sample": False, "decoder_start_token_id": 0, "attention_mask": mask}
    for beams in (1, 3):
        cached, uncached = (
            pruned.generate(ids, **say, num_beams=beams, use_cache=c, output_scores=True, return_dict_in_generate=True)
            for c in (True, False)
        )
        assert torch.equal(cached.sequences, uncached.sequences)
        torch.testing.assert_close(torch.stack(cached.scores), torch.stack(uncached.scores), rtol=1e-4, atol=1e-4)


def test_the_first_block_of_t5_keeps_the_attention_that_makes_the_bias_of_all():
    found = discover(tiny_model("t5", transformers.AutoModelForSeq2SeqLM))
    assert [sorted(block.kept) for block in found.stack("encoder").blocks] == [["attn"], [], [], []]
    assert [sorted(block.kept) for block in found.stack("decoder").blocks] == [["attn", "cross"], [], [], []]


PLAIN = """
import json, sys, torch, transformers
for folder, auto in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert "dropformer" not in sys.modules
    inputs = torch.load(folder + "/inputs.pt")
    with torch.no_grad():
        print("GIVES", type(model).__name__, float(model(**inputs)[0].double().sum()))
"""
HEADS = [("bert", "SequenceClassification"), ("electra", "PreTraining"), ("t5", "Seq2SeqLM")]
HEADS += [("vit", "ImageClassification"), ("bert", "QuestionAnswering")]


def test_without_dropformer_remote_code_loads_every_head(tmp_path, elsewhere):
    made, want = [], []
    for family, head in HEADS:
        model = tiny_model(family, getattr(transformers, f"AutoModelFor{head}"))
        folder = tmp_path / f"{family}-{head}"
        plan = api.plan_unscored(mine(), api.outline(model), specs(family), (), None)
        pruned = api.drop(model, plan)
        api.save(pruned, folder)
        inputs = sample_inputs(model)
        torch.save(inputs, folder / "inputs.pt")
        with torch.no_grad():
            want.append((type(pruned).__name__, float(pruned(**inputs)[0].double().sum())))
        made.append((str(folder), f"AutoModelFor{head}"))
    done = elsewhere(PLAIN, json.dumps(made))
    assert done.returncode == 0, done.stderr
    got = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("GIVES")]
    for (name, total), (want_name, want_total) in zip(got, want, strict=True):
        assert name == want_name and float(total) == pytest.approx(want_total, abs=1e-3)


def mine():
    return api.ModelRef(name="mine")


def specs(family):
    return "decoder.cross=1,encoder.mlp=2" if family == "t5" else "attn=1"


class TestVisionTower:
    @pytest.fixture
    def llava(self):
        return tiny_model("llava", transformers.AutoModelForImageTextToText)

    def test_it_is_left_alone_unless_it_is_named(self, llava):
        assert [stack.name for stack in api.outline(llava, "attn:1").stacks] == [""]
        assert [stack.name for stack in api.outline(llava, "vision.attn:1,mlp:1").stacks] == ["vision", ""]

    def test_it_is_scored_on_batches_with_images(self, llava):
        scores = dropformer.analyze(llava, [with_images(llava)])
        plan = dropformer.plan(scores, "vision.mlp:1,attn:1")
        assert sorted(layer.stack for layer in plan.layers) == ["", "vision"]
        assert len(dropformer.analyze(llava, [sample_inputs(llava)]).layers) == 12

    def test_its_blocks_stay_where_the_config_counts_them(self, llava):
        plan = api.plan_unscored(mine(), api.outline(llava, "vision.block=3"), "vision.block=3", (), None)
        pruned = api.drop(llava, plan)
        assert "vision_feature_layer" in api.drop_record(pruned).surgery.note
        assert len(pruned.model.vision_tower.encoder.layers) == 4


@pytest.mark.parametrize(
    "family, auto, tokens",
    [("gpt2", "CausalLM", 128), ("roberta", "MaskedLM", 126), ("bart", "Seq2SeqLM", 128), ("llama", "CausalLM", None)],
)
def test_the_longest_text_is_what_learned_positions_reach(family, auto, tokens):
    model = tiny_model(family, getattr(transformers, f"AutoModelFor{auto}"))
    assert longest_text(model) == tokens
    if tokens:
        ids = torch.full((1, tokens + 1), 5)
        model(ids[:, 1:])
        with pytest.raises((IndexError, RuntimeError), match="index"):
            model(ids)


def test_sparse_windows_by_block_follow_the_encoder_alone():
    model = tiny_model("led", transformers.AutoModelForSeq2SeqLM, attention_window=[4, 8, 4, 8])
    outline = api.outline(model)
    for spec, left in (("encoder.block=1", [4, 4, 8]), ("decoder.block=1", [4, 8, 4, 8])):
        plan = api.plan_unscored(mine(), outline, spec, (), None)
        surgery = api.plan_surgery(outline, plan.layers, model)
        fields = pruned_config(model.config.to_dict(), outline, surgery.block_map)
        assert fields["attention_window"] == (left if not surgery.note else [4, 8, 4, 8]), surgery.note
