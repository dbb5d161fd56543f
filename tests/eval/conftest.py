"""A tiny Llama, a tokenizer made on the spot, and MMLU-shaped questions: no network, no download."""

import csv
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = re.findall(
    r"\w+",
    "the bone heart nerve supplies question which of following force energy moves star planet light is not "
    "a an first second most least causes effect under over between artery muscle law court right wrong",
)


def sentence(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, so that a space belongs to the word behind it, as in real ones."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(0)
    inner.train_from_iterator([f"Answer: {draw.choice('ABCD')} {sentence(draw, 5, 9)}" for _ in range(200)], trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def make_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def write_mmlu(folder: Path, subjects: dict[str, int], dev: int = 5) -> Path:
    """MMLU's layout with made-up questions: subject -> number of test questions."""
    draw = random.Random(1)
    for subject, questions in subjects.items():
        for split, count in (("dev", dev), ("test", questions)):
            path = folder / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                for _ in range(count):
                    choices = [sentence(draw, 1, 4) for _ in range(4)]
                    writer.writerow([sentence(draw, 4, 14) + "?", *choices, draw.choice("ABCD")])
    return folder


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The makers above, for a test that needs another of them (a conftest cannot be imported)."""
    return SimpleNamespace(llama=make_llama, tokenizer=make_tokenizer, mmlu=write_mmlu, sentence=sentence)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="session")
def mmlu_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mmlu")
    return write_mmlu(folder, {"anatomy": 12, "astronomy": 20, "world_religions": 8, "sociology": 10})
