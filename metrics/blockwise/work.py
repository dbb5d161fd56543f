"""What choosing and repairing has cost so far, in forward passes over the calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

Progress = Callable[[int, int], None]  # block-steps of all windows, tokens through the whole model


@dataclass
class Work:
    """Counts tokens that pass blocks.

    One forward pass of all calibration windows is `blocks` x `tokens`; a block without one of its branches counts
    by the share of its parameters that are left.  The head is not counted.  `progress` hears of every step: blocks
    that all windows have passed, and tokens.
    """

    blocks: int = 1
    tokens: int = 1
    progress: Progress | None = None
    spent: float = 0.0  # tokens x blocks
    _sizes: dict[str, int] = field(default_factory=dict)

    @property
    def passes(self) -> float:
        return self.spent / (self.blocks * self.tokens)

    def measure(self, model: nn.Module, paths: Sequence[str]) -> None:
        """Note the blocks' dense sizes, before anything is replaced."""
        for path in paths:
            self._sizes.setdefault(path, _parameters(model.get_submodule(path)))

    def add(self, path: str, block: nn.Module, tokens: int) -> None:
        """A block has run on so many tokens."""
        whole = self._sizes.get(path, 0)
        self.spent += tokens * min(1.0, _parameters(block) / whole if whole else 1.0)
        if self.progress:
            self.progress(int(self.spent / self.tokens), int(self.spent / self.blocks))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
