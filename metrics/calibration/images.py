"""Calibration on images: a folder of them through the model's image processor, or random pixels.

Checking names does not import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropformer.metrics.calibration.settings import Calibration, CalibrationRef
from dropformer.metrics.calibration.text import check_name
from dropformer.prune.errors import CalibrationError, reason

if TYPE_CHECKING:
    from torch import Tensor

PIXELS = "pixels"
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Pictures:
    """`CalibrationData` of preprocessed images [N, ...]; every patch is scored."""

    pixels: Tensor
    ref: CalibrationRef

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def lengths(self) -> list[int]:
        """All images have the same size."""
        return [1] * len(self)

    def batches(self, size: int) -> Iterator[tuple[dict[str, Tensor], None]]:
        """(model inputs, None) for `size` images at a time."""
        for first in range(0, len(self), size):
            yield self.batch(range(first, min(first + size, len(self))))

    def batch(self, which: Sequence[int]) -> tuple[dict[str, Tensor], None]:
        """(model inputs, None: every position is scored) of these images."""
        return {"pixel_values": self.pixels[list(which)]}, None


def image_files(name: str) -> list[Path]:
    """The images in a folder, sorted.  Raises CalibrationError if there are none."""
    found = sorted(p for p in Path(name).rglob("*") if p.suffix.lower() in SUFFIXES) if Path(name).is_dir() else []
    if not found:
        raise CalibrationError(
            f"`{name}` is not a folder of images; expected one with {', '.join(sorted(SUFFIXES))} files, "
            f"or `{PIXELS}` for random ones"
        )
    return found


def check_texts(names: Iterable[str]) -> None:
    """Raises CalibrationError for a name that is neither a text nor images."""
    for name in names:
        if Path(name).is_dir():
            image_files(name)
        elif name != PIXELS:
            check_name(name)


def pictures(calibration: Calibration, config: Any, folder: Path) -> Pictures:
    """The images that a calibration names: a folder of images, or `pixels` for uniform random ones.

    `folder` holds the model and its image processor.  All images are used if there are fewer than requested.
    Raises CalibrationError for a text, for a folder without images, and for a model without an image processor.
    """
    from dropformer.prune.samples.inputs import random_pixels

    if calibration.name == PIXELS:
        pixels = random_pixels(config, calibration.samples, calibration.seed)
    else:
        pixels = _read(calibration, folder)
    digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    fields = {"length": pixels.shape[-1], "seed": calibration.seed, "packed": False, "skip_first": 0}
    return Pictures(pixels, CalibrationRef(name=calibration.name, samples=len(pixels), hash=digest, **fields))


def _read(calibration: Calibration, folder: Path) -> Tensor:
    import torch

    files = image_files(calibration.name)
    process = _processor(folder)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(calibration.seed))
    return torch.cat([_one(process, files[i]) for i in order[: calibration.samples].tolist()])


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    from dropformer.prune.loading.quiet import quiet_transformers

    try:
        with quiet_transformers():
            return AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError):
        raise CalibrationError(
            f"{folder} has no image processor (preprocessor_config.json) to read images with; "
            f"add it, or calibrate on `{PIXELS}`"
        ) from None


def _one(process: Any, path: Path) -> Tensor:
    """One image, [1, C, H, W] float32."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return process(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"].float()
    except (OSError, ValueError) as error:
        raise CalibrationError(f"image {path} cannot be read: {reason(error)}") from None
