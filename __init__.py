"""dropformer: find the layers a Transformer can do without, take them out, prove what it cost.

    import dropformer
    scores = dropformer.analyze("smollm2-135m")
    plan = dropformer.plan(scores, "attn:4")
    model = dropformer.drop("smollm2-135m", plan)
    dropformer.save(model, "smollm2-135m-attn4")
    model = dropformer.load("smollm2-135m-attn4")

After `import dropformer`, transformers' Auto classes load pruned checkpoints too.
"""

from importlib import import_module
from typing import Any

from dropformer.prune.loading.registration import register_when_transformers_loads
from dropformer.version import __version__

_API = dict.fromkeys(("Calibration", "analyze", "drop", "load", "open_model", "plan", "save"), "dropformer.api")
_API |= dict.fromkeys(("describe", "discover"), "dropformer.prune.discovery.discover")
_API |= {"improve": "dropformer.selection", "DropformerError": "dropformer.prune.errors"}
__all__ = ["__version__", *_API]

register_when_transformers_loads()


def __getattr__(name: str) -> Any:
    """The API is imported on first use: torch takes seconds, `prune --help` must not."""
    if name in _API:
        return getattr(import_module(_API[name]), name)
    raise AttributeError(f"module 'dropformer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
