"""A tiny batch that any model can run, to read its structure and to prove what was found."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.prune.errors import ArchitectureError

# Tables of absolute positions of a text: not of distances, and not of a vision tower's patches.
POSITIONS = re.compile(r"^(?!.*(rel|dist|vision|visual|image|patch)).*(position|\bwpe\b)", re.I)


def sample_inputs(model: nn.Module, batch: int = 2, length: int = 8) -> dict[str, Any]:
    """Keyword arguments for one small forward pass of a transformers model, on its device.

    Token ids [batch, length] for text, random pixels for images, both sides for an encoder-decoder.  Texts are longer
    where a shorter one would change the model.
    """
    config = getattr(model, "config", None)
    length = max(length, _sparse_length(config))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        return {"pixel_values": random_pixels(config, batch).to(device)}
    generator = torch.Generator().manual_seed(0)
    if name == "input_features":
        shape = (batch, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500))
        features = {"input_features": torch.randn(shape, generator=generator).to(device)}
        ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        return features | ({"decoder_input_ids": ids, "use_cache": False} if config.is_encoder_decoder else {})  # type: ignore[union-attr]
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    vocab = int(getattr(text, "vocab_size", 0) or 32)
    batch *= getattr(config, "num_codebooks", 1) if getattr(config, "audio_channels", None) else 1  # MusicGen
    ids = torch.randint(0, vocab, (batch, length), generator=generator).to(device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False  # a block must be callable again on the same inputs
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.clone()
    return inputs


def _sparse_length(config: Any) -> int:
    """The fewest tokens, in whole blocks, that BigBird attends to sparsely; 0 for other models.

    On fewer it exchanges its sparse attention for a full one, for good.  Where its positions do not reach as far it
    is never sparse.
    """
    if getattr(config, "attention_type", None) != "block_sparse":
        return 0
    tokens = (6 + 2 * config.num_random_blocks) * config.block_size
    return tokens if tokens <= config.max_position_embeddings else 0


def with_images(model: Any, batch: int = 2, length: int = 8) -> dict[str, Any]:
    """The same for a vision-language model with an image before each text.

    Raises ArchitectureError for a model whose images are more than pixels of one size.
    """
    device = next(model.parameters()).device
    given = sample_inputs(model, batch, length)
    try:
        pixels = random_pixels(model.config, batch).to(device)
        with torch.no_grad():
            features = model.get_image_features(pixel_values=pixels).pooler_output
        token = getattr(model.config, "image_token_id", None)
        token = model.config.image_token_index if token is None else token
        text = given["input_ids"].masked_fill(given["input_ids"] == token, (token + 1) % 2)
        ids = torch.cat([torch.full((batch, features[0].shape[-2]), token, device=device), text], dim=1)
        model(**{**given, "input_ids": ids, "pixel_values": pixels})
    except Exception as error:  # whatever the model's own code raises: Qwen2-VL asks for a grid of patches
        raise ArchitectureError(
            f"the images of {type(model).__name__} are not plain pixels ({type(error).__name__}), so its vision tower "
            "cannot be read here; use dropformer.analyze(model, batches) with its processor's batches"
        ) from error
    return {**given, "input_ids": ids, "pixel_values": pixels}


def random_pixels(config: object, batch: int, seed: int = 0) -> Tensor:
    """Images of the size that a config names, uniform from 0 to 1.  [batch, channels, height, width]"""
    if not hasattr(config, "image_size"):
        config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, getattr(config, "num_channels", 3), height, width, generator=generator)


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
