"""The command line on what is no causal language model: encoders, encoder-decoders, vision models."""

import json

import pytest
import torch
from command import run
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast
from transformers import AutoModelForSequenceClassification as Classifier

import dropformer

WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
BERT = {**WIDTHS, "vocab_size": 64, "max_position_embeddings": 24, "num_labels": 3}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 3, "num_heads": 4, "vocab_size": 64}
T5 |= {"decoder_start_token_id": 0}
VIT = {**WIDTHS, "image_size": 16, "patch_size": 4, "num_labels": 3}
SMALL = ("--samples", "3", "--quiet")


def bad(*args, capsys, said):
    status, out, err = run(*args, capsys=capsys)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert said in err


def tokenizer(frame):
    """64 tokens, letters and digits; `frame` is how it puts special tokens around a text."""
    letters = [chr(c) for c in range(97, 123)] + list("0123456789 .,:;()_-'\"`*=<>/[]{}\n#")
    vocab = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", *letters][:64])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(frame, special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def saved(auto, family, config, folder, frame=None):
    torch.manual_seed(0)
    auto.from_config(AutoConfig.for_model(family, **config)).save_pretrained(folder)
    if frame:
        tokenizer(frame).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(here):
    return saved(Classifier, "bert", BERT, here / "bert", "[CLS] $A [SEP]")


@pytest.fixture
def t5(here):
    return saved(AutoModelForSeq2SeqLM, "t5", T5, here / "t5", "$A [SEP]")


@pytest.fixture
def vit(here):
    return saved(AutoModelForImageClassification, "vit", VIT, here / "vit")


def test_an_encoder_is_calibrated_on_text_that_is_framed_and_fits(bert, here, capsys):
    status, out, _ = run("analyze", bert, *SMALL, capsys=capsys)
    assert status == 0 and "builtin" in out
    scores = json.loads((here / "bert-scores" / "scores.json").read_text())
    assert scores["calibration"]["length"] == 24  # the default, 512, is more than the model reads
    assert len(scores["layers"]) == 12
    bad("analyze", bert, *SMALL, "--length", "25", capsys=capsys, said="longer than the context")


def test_an_encoder_keeps_its_head_and_its_report_compares_outputs(bert, here, capsys):
    status, out, err = run("--model", bert, "--drop", "attn:1,mlp:1", "--out", "small", *SMALL, capsys=capsys)
    assert (status, err) == (0, "")
    assert "no perplexity" in out and "same first choice" in out
    report = json.loads((here / "small" / "report.json").read_text())
    assert report["dense"]["perplexity"] is None and 0 < report["outputs"]["cosine"] <= 1
    assert report["outputs"]["on"] == "heldout" and report["outputs"]["kl"] is not None
    assert type(dropformer.load(here / "small")).__name__ == "DropformerBertForSequenceClassification"


def test_an_encoder_decoder_reads_its_text_on_both_sides(t5, here, capsys):
    status, out, err = run(
        "--model", t5, "--drop", "encoder.attn:1,decoder.cross:1", "--out", "small", "--samples", "3",
        "--length", "16", capsys=capsys,
    )  # fmt: skip
    assert status == 0 and "the decoder reads the encoder's text, shifted right" in err and "no perplexity" in out
    dropped = json.loads((here / "small" / "dropformer.json").read_text())["dropped"]
    assert len(dropped["encoder"]["attention"]) == 1 and len(dropped["decoder"]["cross_attention"]) == 1


def test_a_vision_model_without_images_is_calibrated_on_random_pixels_and_says_so(vit, here, capsys):
    status, out, err = run("--model", vit, "--drop", "mlp:1", "--out", "small", "--samples", "3", capsys=capsys)
    assert status == 0 and "warning: calibration: random pixels, no images" in err
    assert "outputs on 8 samples of `pixels`" in out and "KV cache" not in out
    assert json.loads((here / "small" / "scores.json").read_text())["calibration"]["name"] == "pixels"


def test_a_vision_model_is_calibrated_on_a_folder_of_images(vit, here, capsys):
    size = {"height": 16, "width": 16}
    (vit / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": size})
    )
    (here / "images").mkdir()
    for i in range(3):
        Image.effect_noise((20 + i, 30), 90).save(here / "images" / f"{i}.png")
    status, _, err = run("analyze", vit, "--calibration", here / "images", "--samples", "9", capsys=capsys)
    assert status == 0 and "3 images" in err
    calibration = json.loads((here / "vit-scores" / "scores.json").read_text())["calibration"]
    assert (calibration["samples"], calibration["length"]) == (3, 16)
    (here / "images" / "1.png").write_bytes(b"no image")
    options = ("--calibration", here / "images", "--out", "again", *SMALL)
    bad("analyze", vit, *options, capsys=capsys, said="1.png cannot be read")


def test_calibration_that_a_model_cannot_take_is_one_line(bert, vit, here, capsys):
    (here / "empty").mkdir()
    bad("analyze", vit, "--calibration", "builtin", "-q", capsys=capsys, said="is not a folder of images")
    bad("analyze", vit, "--calibration", here / "empty", "-q", capsys=capsys, said="is not a folder of images")
    bad("analyze", bert, "--calibration", "pixels", "-q", capsys=capsys, said="`pixels` is unknown")
    Image.new("RGB", (8, 8)).save(here / "empty" / "a.png")
    bad("analyze", vit, "--calibration", here / "empty", "-q", capsys=capsys, said="no image processor")


def test_what_needs_a_causal_model_says_so(bert, vit, here, capsys):
    for model in (bert, vit):
        bad("--model", model, "--drop", "attn:1", "--quality", "best", *SMALL, capsys=capsys, said="causal")
        bad("sweep", model, "--drop", "attn:0..2", *SMALL, capsys=capsys, said="causal")
