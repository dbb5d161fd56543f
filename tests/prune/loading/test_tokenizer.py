"""Tokenizers beside a model: what stands in for a missing one is none."""

import json

import pytest
from transformers import AutoConfig, ByT5Tokenizer

from dropformer.prune.loading.tokenizer import open_tokenizer, why_no_tokenizer


@pytest.mark.parametrize("family", ["t5", "gpt_neox", "bart"])
@pytest.mark.parametrize("settings", [None, {}])
def test_a_tokenizer_of_special_tokens_alone_is_none(tmp_path, family, settings):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_tokenizer(tmp_path) is None
    assert ("has no tokenizer" if settings is None else "its vocabulary is missing") in why_no_tokenizer(tmp_path)


def test_a_tokenizer_of_bytes_needs_no_vocabulary(tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert open_tokenizer(tmp_path)("ab").input_ids == [100, 101, 1]
