"""Names of images to calibrate on, checked without reading any."""

from __future__ import annotations

from pathlib import Path

from dropformer.prune.errors import CalibrationError

PIXELS = "pixels"
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


def image_files(name: str) -> list[Path]:
    """The images in a folder, sorted.  Raises CalibrationError where there are none."""
    found = sorted(p for p in Path(name).rglob("*") if p.suffix.lower() in SUFFIXES) if Path(name).is_dir() else []
    if not found:
        raise CalibrationError(
            f"`{name}` is no folder of images; expected one with {', '.join(sorted(SUFFIXES))} files, "
            f"or `{PIXELS}` for random ones"
        )
    return found
