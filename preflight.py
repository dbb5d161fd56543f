"""What can be checked before anything heavy is imported, so that a wrong argument is answered at once."""

from __future__ import annotations

import json
from pathlib import Path

from dropformer.metrics.images import PIXELS, image_files
from dropformer.metrics.text import check_name
from dropformer.prune.errors import OutputError, PlanError
from dropformer.prune.files import open_checkpoint
from dropformer.prune.formats import known_format
from dropformer.prune.plan import parse_spec
from dropformer.recipes.source import locate

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def check(
    model: str,
    drop: str | None,
    calibration: str | None = None,
    out: Path | None = None,
    format: str = "dropformer",
) -> None:
    """Raise the error that the arguments would end in, as far as their files alone can tell."""
    known_format(format)
    if drop:
        parse_spec(drop)
    if out:
        check_out(out)
    for name in calibration.split(",") if calibration else ():
        if Path(name).is_dir():
            image_files(name)
        elif name != PIXELS:
            check_name(name)
    folder = locate(model)
    if folder:
        open_checkpoint(folder)
        check_drop(drop, folder, model)


def check_drop(drop: str | None, folder: Path, name: str) -> None:
    """Raises PlanError where a spec asks for more layers than the config in a folder has."""
    blocks = _blocks(folder)
    for selector in parse_spec(drop) if drop else ():
        limit = blocks and blocks * len(selector.kinds)
        if limit and not selector.percent and selector.count > limit:
            raise PlanError(
                f"`{selector}` drops {selector.count} layers, but {name} has {limit} of that kind; ask for fewer"
            )


def check_out(out: Path) -> None:
    """Raises OutputError where a checkpoint could not be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an empty folder; choose another --out or remove it")


def default_out(model: str, drop: str | None, plan: Path | None) -> Path:
    """./MODEL-SPEC, as in llama-2-13b-attn16."""
    spec = drop if drop else (plan.stem if plan else "pruned")
    short = "".join(c if c.isalnum() or c in ".=-" else "-" if c == "," else "" for c in spec.replace("%", "pct"))
    return Path(f"{short_name(model)}-{short}")


def short_name(model: str) -> str:
    return Path(model.partition("@")[0]).name.removesuffix(".gguf")


def _blocks(folder: Path) -> int | None:
    """The number of blocks that config.json states, if it does so in a usual field of its top level."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = [config[key] for key in LAYER_COUNTS if isinstance(config.get(key), int)]
    return found[0] if found else None
