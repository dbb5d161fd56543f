"""The texts of `quality.py`: calibration, validation by domain, and the one that gates repairs."""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import Windows, windows

SOURCES = (
    *("argparse", "ast", "csv", "difflib", "fractions", "heapq", "inspect"),
    *("json/decoder", "pathlib", "statistics", "tarfile", "textwrap", "zipfile"),
)


@dataclass(frozen=True)
class Texts:
    """Windows to calibrate on, one entry per domain; to validate on, by name; and to gate repairs on."""

    calibration: list[Windows]
    judged: dict[str, Windows]
    gate: Windows


def texts(tokenizer: object, wikitext: Path, samples: int, judged: int, length: int) -> Texts:
    """Cut all texts into windows.  Wikitext: the first 60 % to calibrate on, the rest to validate on."""

    def cut(name: str | Path, count: int) -> Windows:
        return windows(Calibration(str(name), samples=count, length=length, seed=1), tokenizer)

    with tempfile.TemporaryDirectory() as folder:
        half, files = max(1, samples // 2), {}
        parts = {"code": _code(), "docstrings": _docstrings()}
        if wikitext.is_file():
            text = wikitext.read_text(encoding="utf-8")
            middle = text.index("\n", int(len(text) * 0.6))
            parts |= {"calibration": text[:middle], "wikitext": text[middle:]}
        else:
            print(f"no {wikitext}: calibration and validation without wikitext", file=sys.stderr)
        for name, text in parts.items():
            files[name] = Path(folder) / f"{name}.txt"
            files[name].write_text(text, encoding="utf-8")
        calibration = [cut(files["calibration"], half)] if "calibration" in files else []
        domains = {"wikitext": files.get("wikitext"), "builtin": "heldout", "code": files["code"]}
        return Texts(
            [*calibration, cut("builtin", half)],
            {name: cut(where, judged) for name, where in domains.items() if where},
            cut(files["docstrings"], max(2, judged // 2)),
        )


def _code() -> str:
    root = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join((root / f"{name}.py").read_text(encoding="utf-8") for name in SOURCES)


def _docstrings() -> str:
    found = {name: getattr(torch, name).__doc__ for name in sorted(dir(torch)) if name.islower()}
    return "\n\n".join(text for text in found.values() if isinstance(text, str) and len(text) > 400)
