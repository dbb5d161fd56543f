"""A tiny batch that any model can run, to read its structure and to prove what was found."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.parts import text_config

# Tables of absolute positions of a text: not of distances, and not of a vision tower's patches.
POSITIONS = re.compile(r"^(?!.*(rel|dist|vision|visual|image|patch)).*(position|\bwpe\b)", re.I)


def sample_inputs(model: nn.Module, batch: int = 2) -> dict[str, Any]:
    """Keyword arguments for one small forward pass of a transformers model, on its device.

    Token ids [batch, length] for text, random pixels for images, both sides for an encoder-decoder.  Texts are longer
    where a shorter one would change the model.
    """
    config: Any = getattr(model, "config", None)
    length = max(8, _sparse_length(config))
    device = input_device(model)
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        return {"pixel_values": random_pixels(config, batch).to(device, dtype)}
    generator = torch.Generator().manual_seed(0)
    if name == "input_features":
        shape = (batch, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500))
        features = {"input_features": torch.randn(shape, generator=generator).to(device)}
        ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        return features | ({"decoder_input_ids": ids, "use_cache": False} if config.is_encoder_decoder else {})
    text = text_config(config)
    vocab = int(getattr(text, "vocab_size", 0) or 32)
    batch = 1 if reads_one_text(model) else batch
    batch *= getattr(config, "num_codebooks", 1) if getattr(config, "audio_channels", None) else 1  # MusicGen
    ids = torch.randint(0, vocab, (batch, length), generator=generator).to(device)
    inputs: dict[str, Any] = as_head_reads({"input_ids": ids}, model) | uncached(model)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    return inputs


def uncached(model: Any) -> dict[str, Any]:
    """The argument that keeps a model from making a cache: a block must be callable again on the same inputs.

    Many models that write text (LLaVA, Qwen3-VL, Granite-MoE) do not name it and hand it on, as `generate` relies on.
    """
    takes = inspect.signature(model.forward).parameters
    hands_on = any(p.kind is p.VAR_KEYWORD for p in takes.values()) and hasattr(model, "generate")
    return {"use_cache": False} if "use_cache" in takes or hands_on else {}


def _sparse_length(config: Any) -> int:
    """The fewest tokens, in whole blocks, that BigBird attends to sparsely; 0 for other models.

    On fewer it exchanges its sparse attention for a full one, for good.  Where its positions do not reach as far it
    is never sparse.
    """
    if getattr(config, "attention_type", None) != "block_sparse":
        return 0
    tokens = (6 + 2 * config.num_random_blocks) * config.block_size
    return tokens if tokens <= config.max_position_embeddings else 0


def random_pixels(config: object, batch: int, seed: int = 0) -> Tensor:
    """Images of the size that a config names, uniform from 0 to 1.  [batch, channels, height, width]"""
    if not hasattr(config, "image_size"):
        config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, getattr(config, "num_channels", 3), height, width, generator=generator)


def first_output(output: Any) -> Tensor:
    """The first output in float32; that of a backbone, a tuple of feature maps, as one vector."""
    first = output[0]
    return first.float() if isinstance(first, Tensor) else torch.cat([part.float().flatten() for part in first])


def reads_one_text(model: Any) -> bool:
    """Does a decoder with a classification head refuse batches, because its config names no padding token?"""
    config = getattr(model, "config", None)
    text = text_config(config)
    pads = [getattr(part, "pad_token_id", None) for part in (config, text)]
    return "ForSequenceClassification" in type(model).__name__ and None in pads


def as_head_reads(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Texts [B, T] as the model's head takes them: one choice each for multiple choice, [B, 1, T], and one end-of-text
    token each, the last real one, where an encoder-decoder classifies by it (BART, T5); others as they are."""
    head, config, ids = type(model).__name__, getattr(model, "config", None), inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        return inputs
    if "ForMultipleChoice" in head:
        flat = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.shape == ids.shape}
        return inputs | {key: value[:, None] for key, value in flat.items()} if ids.ndim == 2 else inputs
    eos = getattr(config, "eos_token_id", None)
    two = getattr(config, "is_encoder_decoder", False)
    if "ForSequenceClassification" not in head or not two or not isinstance(eos, int):
        return inputs
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    last = mask.long().cumsum(1).argmax(1, keepdim=True)
    return inputs | {"input_ids": ids.masked_fill(ids == eos, eos - 1 if eos else 1).scatter(1, last, eos)}


def takes_pictures(model: object) -> bool:
    """Does the model read images and nothing else?"""
    return getattr(model, "main_input_name", "input_ids") == "pixel_values"


def writes_text(model: object) -> bool:
    """Does the model write text token by token from the text itself: is it a causal language model?"""
    return hasattr(model, "generate") and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def longest_text(model: nn.Module) -> int | None:
    """How many tokens the model's tables of learned positions reach; None where it has no such table."""
    tables = (m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and POSITIONS.search(name))
    found = [m.num_embeddings - _offset(m) for m in tables]
    return min(found, default=None)


def _offset(table: nn.Embedding) -> int:
    """Rows of a position table that no token gets: RoBERTa counts from its padding on, BART from 2."""
    return int(getattr(table, "offset", 0) or (table.padding_idx + 1 if table.padding_idx is not None else 0))
