"""What config.json names."""

import pytest

from dropformer.prune.files.config_json import auto_class_name

HEADS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification")


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("ViTForImageClassification", "AutoModelForImageClassification"),
        ("BartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("BertForMaskedLM", "AutoModel"),
        ("ViTModel", "AutoModel"),
    ],
)
def test_an_architecture_is_loaded_by_the_auto_class_of_its_head(architecture, auto):
    assert auto_class_name(architecture, HEADS) == auto
