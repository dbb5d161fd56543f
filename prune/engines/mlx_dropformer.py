"""A pruned checkpoint in mlx-lm: the folder's own model file, which `--trust-remote-code` runs.

config.json names it (`"model_file": "mlx_dropformer.py"`).  It builds mlx-lm's own class of the base family and takes
out the modules that the config drops.  Self-contained: mlx and mlx-lm only, and nothing here knows a family.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.utils import _get_classes

CONFIG: dict[str, Any] = json.loads((Path(__file__).parent / "config.json").read_text(encoding="utf-8"))
BASE = {**CONFIG, "model_type": CONFIG["base_model_type"], "architectures": []}
BaseModel, BaseArgs = _get_classes(BASE)


def note_tokens(x: mx.array, cache: Any) -> None:
    """Record the text's length in a dropped attention's cache entry, as keys of width 0: masks may be made from it."""
    if cache is not None:
        empty = mx.zeros((x.shape[0], 1, x.shape[1], 0), x.dtype)
        cache.update_and_fetch(empty, empty)


class Zeros(nn.Module):
    """In place of a dropped attention or MLP.  Hidden states [B, T, D] -> zeros [B, T, D]."""

    def __call__(self, x: mx.array, *args: Any, cache: Any = None, **kwargs: Any) -> mx.array:
        note_tokens(x, cache if cache is not None else next((a for a in args if hasattr(a, "update_and_fetch")), None))
        return mx.zeros_like(x)


class LinearMap(nn.Linear):
    """In place of an attention layer that became one linear map.  [B, T, D] -> [B, T, D]."""

    def __call__(self, x: mx.array, *args: Any, cache: Any = None, **kwargs: Any) -> mx.array:
        note_tokens(x, cache if cache is not None else next((a for a in args if hasattr(a, "update_and_fetch")), None))
        return super().__call__(x)


class ModelArgs:
    """The base family's arguments."""

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Any:
        pattern = {k[1:]: v for k, v in config.items() if k == "_sliding_window_pattern"}
        return BaseArgs.from_dict({**pattern, **config, "model_type": CONFIG["base_model_type"]})


class Model(BaseModel):  # type: ignore[misc, valid-type]
    """The base family's model without the modules that config.json drops."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        stop_where_counted(args)
        for path, form in CONFIG["dropformer_modules"].items():
            parent, _, name = path.rpartition(".")
            owner = self
            for part in parent.split("."):
                owner = owner[int(part)] if part.isdecimal() else getattr(owner, part)
            if not hasattr(owner, name):
                raise ValueError(f"mlx-lm's {CONFIG['base_model_type']} has no module for {path}, which is dropped")
            setattr(owner, name, replacement(path, form))


def stop_where_counted(args: Any) -> None:
    """Raise ValueError where mlx-lm derives attention types from block numbers that pruning has changed."""
    kinds = CONFIG.get("layer_types") or []
    every = getattr(args, "sliding_window_pattern", None)
    if hasattr(args, "layer_types") or (not every and len(set(kinds)) < 2):
        return
    counted = [(i + 1) % every == 0 for i in range(len(kinds))] if every else None
    if counted != [kind == "full_attention" for kind in kinds]:
        raise ValueError(
            f"mlx-lm gives windows to blocks of {CONFIG['base_model_type']} by their number, which dropped blocks have "
            "changed; load it in transformers, or drop attention and MLP layers alone"
        )


def replacement(path: str, form: Any) -> nn.Module:
    """The module that a form of config.json describes; the identity for norms of a dropped branch."""
    if isinstance(form, dict) and "window" in form:
        raise ValueError(f"{path} attends to a window and the first tokens, which mlx-lm has no form for")
    if isinstance(form, dict) and "agents" in form:
        raise ValueError(f"{path} attends through agents, which mlx-lm has no form for")
    if isinstance(form, dict):
        return LinearMap(*form["linear"])
    return nn.Identity() if form == "input" else Zeros()
