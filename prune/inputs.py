"""A tiny batch that any model can run, to read its structure and to prove what was found."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def sample_inputs(model: nn.Module, batch: int = 2, length: int = 8) -> dict[str, Any]:
    """Keyword arguments for one small forward pass of a transformers model, on its device.

    Token ids [batch, length] for text, random pixels for images, both sides for an encoder-decoder.
    """
    config = getattr(model, "config", None)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        return {"pixel_values": _pixels(config, batch).to(device)}
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


def _pixels(config: object, batch: int) -> Tensor:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, getattr(config, "num_channels", 3), height, width, generator=generator)
