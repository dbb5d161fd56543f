"""The last tokens and the first ones."""

from __future__ import annotations

from dataclasses import dataclass

from dropformer.prune.errors import PlanError
from dropformer.prune.window import Window


@dataclass(frozen=True)
class Windowed:
    """The layer with a window of attention; its weights stay."""

    window: Window

    def __str__(self) -> str:
        return f"window:{self.window}"

    def held(self, context: int) -> int:
        return self.window.held(context)

    def parameters(self, owned: int) -> int:
        return owned


def parse(text: str) -> Windowed:
    """`512+4`.  Raises PlanError for what is no window."""
    if not text:
        raise PlanError("rung `window` names no tokens; expected for example window:512+4")
    return Windowed(Window.parse(text))
