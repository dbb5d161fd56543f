"""Models with other heads than a language model's are run, cut, written and read back with what their head reads."""

import pytest
import torch
import transformers

from dropformer import api
from dropformer.metrics.analysis.analyze import as_inputs
from dropformer.prune.formats.export import reference
from dropformer.prune.loading.load import load
from dropformer.prune.samples.inputs import sample_inputs

PLAIN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
HEADS = {
    "LlamaForQuestionAnswering": PLAIN, "Qwen3ForQuestionAnswering": PLAIN | {"num_key_value_heads": 2, "head_dim": 8},
    "LlamaForTokenClassification": PLAIN, "BertForMultipleChoice": PLAIN, "BartForSequenceClassification": BART,
    "T5ForSequenceClassification": T5, "GPT2ForSequenceClassification": {"n_embd": 32, "n_layer": 3, "n_head": 4},
}  # fmt: skip


def built(name, folder):
    torch.manual_seed(0)
    native = getattr(transformers, name)
    ids = {"pad_token_id": None if "GPT2" in name else 0, "bos_token_id": 1, "eos_token_id": 2}
    native(native.config_class(vocab_size=64, **ids, **HEADS[name])).save_pretrained(folder)
    return api.LoadedModel(load(folder), None, folder, reference("m", folder), None)


@pytest.mark.parametrize("name", HEADS)
def test_it_is_cut_written_and_read_back(tmp_path, name):
    dense = built(name, tmp_path / "dense")
    spec = "encoder.attn=1" if dense.model.config.is_encoder_decoder else "attn=1"
    pruned = api.drop(dense, api.plan_unscored(dense.ref, api.outline(dense.model), spec, (), None))
    api.save(pruned, tmp_path / "out")
    again, inputs = load(tmp_path / "out"), sample_inputs(pruned)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs)[0], pruned.eval()(**inputs)[0])


def test_a_text_of_calibration_ends_where_a_classifier_reads(tmp_path):
    model = built("BartForSequenceClassification", tmp_path / "dense").model
    ids, mask = torch.tensor([[5, 2, 6, 7], [8, 9, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    given = as_inputs(model, {"input_ids": ids, "attention_mask": mask})
    assert given["input_ids"].tolist() == [[5, 1, 6, 2], [8, 2, 0, 0]]
    model(**given)


def test_a_trunk_inside_a_head_is_given_its_windows_once(tmp_path):
    dense = built("LlamaForTokenClassification", tmp_path / "dense")
    api.save(
        api.drop(dense, api.plan_unscored(dense.ref, api.outline(dense.model), "window=1@4+1", (), None)),
        tmp_path / "out",
    )
    attention = load(tmp_path / "out").get_submodule("model.layers.1.self_attn")
    assert len(attention._forward_pre_hooks) == 1
