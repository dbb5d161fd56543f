"""Models with random weights of real shapes, made on the device; nothing is downloaded.

Random weights show speed, memory and that everything fits together, never quality.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dropformer.prune.loading.quiet import quiet_transformers
from dropformer.recipes import recipes

SPECIAL = ("<pad>", "<s>", "</s>")
OWN: dict[str, dict[str, Any]] = {
    "mixture": {
        "model_type": "mixtral", "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 12,
        "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 8, "vocab_size": 32000,
    },
    "gemma": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    },
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4, "vocab_size": 512, "head_dim": 16}


def shape(name: str, small: bool = False) -> dict[str, Any]:
    """The config of a recipe, or of a model of this file; `small`: the same family with a quarter of the layers."""
    fields = dict(OWN[name] if name in OWN else recipes()[name].config)
    fields |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if small:
        groups = fields["num_attention_heads"] // fields["num_key_value_heads"]
        fields |= {key: value for key, value in SMALL.items() if key in fields}
        fields |= {"num_attention_heads": 4, "num_key_value_heads": max(1, 4 // groups)}
        fields["num_hidden_layers"] = max(4, fields["num_hidden_layers"] // 4)
    return fields


def in_memory(name: str, device: torch.device, small: bool = False, blocks: int | None = None) -> PreTrainedModel:
    """The model in bfloat16, its weights drawn on the device itself, the same every time; some of its blocks alone."""
    torch.manual_seed(0)
    fields = shape(name, small)
    fields["num_hidden_layers"] = min(blocks or fields["num_hidden_layers"], fields["num_hidden_layers"])
    config = AutoConfig.for_model(**fields)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def on_disk(name: str, folder: Path, device: torch.device, small: bool = False) -> Path:
    """The model's checkpoint below a folder, with a byte tokenizer; written once."""
    path = folder / name
    if not (path / "tokenizer.json").exists():  # the last file to be written
        with quiet_transformers():
            in_memory(name, device, small).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    return path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, behind the special ones: no merges, nothing to fetch."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
