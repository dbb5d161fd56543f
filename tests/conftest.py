"""Tiny random models that every test may use."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).parent / "makers"))  # modules that several folders' tests import
from elsewhere import Elsewhere

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny random causal LM of a family, the same every time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SHAPE, **changes})).eval()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    return build


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Elsewhere]:
    """Code in processes without dropformer."""
    with Elsewhere() as run:
        yield run


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A tiny Llama as a checkpoint folder, in float32."""
    build("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to run commands in, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DROPFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def lettered(llama_folder, here) -> Path:
    """A tiny Llama with a tokenizer of 64 tokens: letters, digits, punctuation."""
    letters = [chr(c) for c in range(97, 123)] + list("0123456789 .,:;()_-'\"`*=<>/[]{}\n#")
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters][:64])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(llama_folder)
    return llama_folder
