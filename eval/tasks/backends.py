"""Backends of lm-eval tasks by name.  A new one is one function and one entry.  Light: no torch, no lm-eval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dropformer.prune.errors import EvaluationError
from dropformer.prune.registry import Registry, imported

if TYPE_CHECKING:
    from lm_eval.api.model import LM


@dataclass(frozen=True)
class BackendEntry:
    """`make(model, tokenizer, batch_size=..., **options)` gives an lm-eval `LM`; a function or "module:name" of one."""

    summary: str
    make: str | Callable

    def method(self) -> Callable[..., LM]:
        return imported(self.make)


BACKENDS: Registry[BackendEntry] = Registry(
    "--backend",
    {
        "fast": BackendEntry("packed forward passes", "dropformer.eval.tasks.backend:FastLM"),
        "hf": BackendEntry("lm-eval's own model", "dropformer.eval.tasks.backend:own_lm"),
    },
    EvaluationError,
)
