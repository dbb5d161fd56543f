"""The tokenizer against llama.cpp's rule for it, written down independently here.

Reference: cut the text by llama.cpp's expressions for the pre-tokenizer "smollm" (src/llama-vocab.cpp),
each applied to the pieces that the one before left; then merge the bytes of each piece by rank.
"""

import itertools
import json

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dropformer.prune.errors import CheckpointError
from dropformer.recipes import open_source
from dropformer.recipes.gguf import convert_gguf, write_folder

SMOLLM = [r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"]
TEXTS = [
    "Hello world",
    " leading space, and  two",
    "a  1 12 123",
    "in 1969,\n\n3 men\tflew 384400 km;  it's 50% of 7.5½²",
    "def f(x):\n    return x  # ok\n\n\n",
    "naïve — “quotes” 中文字 ١٢٣ 🙂🙂",
    "",
    "   ",
]
ALPHABET = "ab hel\n\t1290½²١é中.,'s-!<|>_🙂 "


def pieces(text, expressions):
    """What is left between matches is a piece of its own."""
    for expression in expressions:
        text = [part for piece in ([text] if isinstance(text, str) else text) for part in cut(piece, expression)]
    return text


def cut(piece, expression):
    at = 0
    for match in regex.finditer(expression, piece):
        yield from filter(None, (piece[at : match.start()], match.group()))
        at = match.end()
    yield from filter(None, (piece[at:],))


def merged(piece, ranks):
    symbols = [bytes_to_unicode()[byte] for byte in piece.encode()]
    while len(symbols) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(itertools.pairwise(symbols)))
        if rank == len(ranks):
            break
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


def reference(text, vocabulary, merges):
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    return [vocabulary[symbol] for piece in pieces(text, SMOLLM) for symbol in merged(piece, ranks)]


@pytest.fixture(scope="session")
def tokenizer(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_folder(tiny.write(folder / "tiny.gguf", tiny.llama()), folder / "tiny")
    return AutoTokenizer.from_pretrained(folder / "tiny")


def contents(tokenizer):
    """Its vocabulary and merges, the latter as `left right`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return state["vocab"], [merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_llama_cpp(tokenizer, tiny, text):
    vocabulary = {token: index for index, token in enumerate(tiny.vocabulary())}
    assert tokenizer(text).input_ids == reference(text, vocabulary, tiny.merges)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=ALPHABET, max_size=30))
def test_tokens_of_any_text_are_those_of_llama_cpp_and_give_it_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids == reference(text, *contents(tokenizer))
    assert tokenizer.decode(ids) == text


def test_digits_are_never_merged_with_each_other_or_with_a_space(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12").input_ids) == ["a", "ĠĠ", "1", "2"]


def test_special_tokens_are_one_token_each_and_nothing_is_put_in_front(tokenizer):
    ids = tokenizer("<|im_start|>he<|im_end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "he", "<|im_end|>"]
    assert tokenizer("he").input_ids == tokenizer("he", add_special_tokens=False).input_ids


@pytest.mark.parametrize("pre", [None, "default", "falcon"])
def test_a_pre_tokenizer_that_nobody_knows_is_refused_instead_of_guessed(tmp_path, tiny, pre):
    path = tiny.write(tmp_path / "tiny.gguf", tiny.llama(), pre=pre)
    with pytest.raises(CheckpointError, match="pre-tokenizer"):
        convert_gguf(path)


def test_gpt_2s_own_rule_keeps_numbers_together(tmp_path, tiny):
    folder = convert_gguf(tiny.write(tmp_path / "tiny.gguf", tiny.llama(), pre="gpt-2"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("he12").input_ids) == ["he", "12"]


@pytest.mark.real
def test_smollm2s_tokens_are_those_of_llama_cpp():
    tokenizer = AutoTokenizer.from_pretrained(open_source("smollm2-135m").path)
    vocabulary, merges = contents(tokenizer)
    assert (len(vocabulary), len(merges)) == (49152, 48900)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == reference(text, vocabulary, merges)
        assert tokenizer.decode(ids) == text
    assert tokenizer("<|im_start|>user\nHi<|im_end|>\n").input_ids[0] == 1
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
