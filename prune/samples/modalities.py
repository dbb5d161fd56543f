"""Sample batches with every modality that a model takes: images and audio beside the text.

A trunk may act by position on image features alone (Qwen3-VL adds them after its first text blocks), which no text
shows.  Batches are made from the config and the model's own feature extractors, without a processor.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.prune.errors import ArchitectureError
from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.parts import tensors_in
from dropformer.prune.samples.inputs import random_pixels, sample_inputs

Inputs = dict[str, Any]


# Arguments of a forward pass that take more than text, whatever the config says.
ARGUMENTS = {
    "image": re.compile(r"pixel|image|visual|vision|video"),
    "audio": re.compile(r"audio|speech|input_features"),
}


def modalities(model: nn.Module) -> tuple[str, ...]:
    """What a model reads beside text, of "image" and "audio"; none for a model of images or audio alone."""
    config = getattr(model, "config", None)
    if config is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        return ()
    taken = " ".join(inspect.signature(model.forward).parameters)
    told = {kind for kind in ARGUMENTS if hasattr(model, f"get_{kind}_features") or _section(config, kind) is not None}
    return tuple(kind for kind, name in ARGUMENTS.items() if kind in told or name.search(taken))


def sample_batches(model: nn.Module) -> list[Inputs]:
    """One sample batch of text alone, or of whatever the model reads first, and one for each modality beside it."""
    extra = (with_modality(model, kind) for kind in modalities(model))
    return [sample_inputs(model), *(batch for batch in extra if batch)]


def with_images(model: Any) -> Inputs:
    """A sample batch of a vision-language model, each text with an image.  Raises ArchitectureError where none of the
    forms of input that are known here fits."""
    found = with_modality(model, "image", 2)
    if found is None:
        raise ArchitectureError(
            f"no sample image fits {type(model).__name__}, so its vision tower cannot be read here; use "
            "dropformer.analyze(model, batches) with its processor's batches"
        )
    return found


def with_modality(model: Any, kind: str, batch: int = 1) -> Inputs | None:
    """A sample batch of texts, each with an image or a piece of audio in it; None where none could be made.

    Several forms of input are tried; the first that the model's forward pass takes is returned.
    """
    extract = getattr(model, f"get_{kind}_features", None)
    token = _token(model.config, kind)
    if extract is None or token is None:
        return None
    for given in (_images if kind == "image" else _audio)(model.config):
        given = _placed(model, given)
        try:
            with torch.no_grad():
                one = _batch(model, kind, given, _count(model, extract(**_known(extract, given))))
                inputs = {k: torch.cat([v] * batch) if isinstance(v, Tensor) else v for k, v in one.items()}
                model(**inputs)
            return inputs
        except Exception:  # whatever the model's own code raises for a form of input that is not its own
            continue
    return None


def _section(config: Any, kind: str) -> Any:
    names: tuple[str, ...] = (
        ("vision_config", "vit_config", "visual") if kind == "image" else ("audio_config", "encoder_config")
    )
    names = names if kind == "image" or hasattr(config, "text_config") else names[:1]
    return next((found for name in names if (found := getattr(config, name, None)) is not None), None)


def _token(config: Any, kind: str) -> int | None:
    for name in (f"{kind}_token_id", f"{kind}_token_index", "media_placeholder_token_id"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    return None


def _images(config: Any) -> Iterator[Inputs]:
    """Images as different families take them: pixels, rows of patches with a grid, tiles."""
    section = _section(config, "image")
    pixels = random_pixels(config, 1)
    sizes = torch.tensor([pixels.shape[-2:]])
    yield {"pixel_values": pixels}
    yield {"pixel_values": pixels, "image_sizes": sizes}
    patch, time = getattr(section, "patch_size", 14), getattr(section, "temporal_patch_size", 1)
    channels: Any = getattr(section, "in_channels", None) or getattr(section, "num_channels", 3)
    side = 2 * (getattr(section, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None) or 1)
    if isinstance(patch, int):
        rows = torch.rand(side * side, channels * (time or 1) * patch * patch, generator=_seeded())
        grid = torch.tensor([[1, side, side]])
        yield {"pixel_values": rows, "image_grid_thw": grid}
    tiles = pixels[:, None].expand(-1, 5, -1, -1, -1).contiguous()
    yield {"pixel_values": tiles, "image_sizes": sizes}
    mask = torch.ones(1, 1, *pixels.shape[-2:], dtype=torch.bool)
    yield {"pixel_values": tiles[:, :1], "pixel_attention_mask": mask}
    yield {"pixel_values": tiles[:, :1], "pixel_attention_mask": mask[..., 0, 0]}
    yield {"pixel_values": tiles[:, :1]}


def _audio(config: Any) -> Iterator[Inputs]:
    """Audio as mel features [1, mel, frames] or [1, frames, mel], with the masks and lengths that families ask for."""
    section = _section(config, "audio")
    mel = next((n for k in ("num_mel_bins", "input_feat_size", "input_dim") if (n := getattr(section, k, None))), 80)
    longest = 2 * int(getattr(section, "max_source_positions", 0) or 0)
    for frames in dict.fromkeys((longest or 64, 200)):
        features = torch.randn(1, mel, frames, generator=_seeded())
        mask = torch.ones(1, frames, dtype=torch.long)
        for shaped in (features, features.transpose(1, 2).contiguous()):
            yield {
                "input_features": shaped,
                "feature_attention_mask": mask,
                "input_features_mask": mask.bool(),
                "attention_mask": mask,
            }


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _placed(model: nn.Module, given: Inputs) -> Inputs:
    """On the model's device, numbers in its dtype."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    device = input_device(model)
    return {k: v.to(device, like.dtype if v.is_floating_point() else None) for k, v in given.items()}


def _known(function: Any, given: Inputs) -> Inputs:
    """Of the inputs those that a function names, and those that it takes unnamed where it names nothing."""
    names = inspect.signature(function).parameters
    wide = not any(name in names for name in given)
    return {k: v for k, v in given.items() if k in names or (wide and k != "attention_mask")}


def _count(model: Any, features: Any) -> int:
    """How many tokens of the text the features take the place of."""
    width = model.get_input_embeddings().weight.shape[-1]
    for name in ("pooler_output", "deepstack_features", "last_hidden_state"):
        if (found := getattr(features, name, None)) is not None:
            first = found[0] if name == "deepstack_features" else found
            return sum(t.numel() for t in tensors_in(first)) // width
    return sum(t.numel() for t in tensors_in(features)) // width


def _batch(model: Any, kind: str, given: Inputs, count: int) -> Inputs:
    """Token ids with as many placeholders as there are features, the features' inputs, and which token is which."""
    base, token = sample_inputs(model, 1), _token(model.config, kind)
    if token is None:
        raise ValueError(f"the config names no placeholder token for an {kind}")
    text: Tensor = base["input_ids"]
    text = text.masked_fill(text == token, (token + 1) % 2)
    ids = torch.cat([text[:, :2], text.new_full((1, count), token), text[:, 2:]], dim=1)
    names = inspect.signature(model.forward).parameters
    inputs = {**base, "input_ids": ids, **{k: v for k, v in given.items() if k in names and k != "attention_mask"}}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in names:
            inputs[name] = (ids == token).long() * (1 if kind == "image" else 3)
    return inputs
