"""Cost of selection and repair so far, in forward passes over the calibration windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from dropformer.progress import Tick


@dataclass
class Work:
    """Counts tokens x blocks.

    One forward pass over all calibration windows is `tokens` x `blocks`; a pruned block counts by the share of its
    parameters that are left, the head not at all.  `progress` is called at every step with the blocks that all windows
    have passed, and the tokens.
    """

    blocks: int = 1
    tokens: int = 1
    progress: Tick | None = None
    spent: float = 0.0  # tokens x blocks
    _sizes: dict[str, int] = field(default_factory=dict)

    @property
    def passes(self) -> float:
        return self.spent / (self.blocks * self.tokens)

    def measure(self, model: nn.Module, paths: Sequence[str]) -> None:
        """Record the blocks' dense sizes, before anything is replaced."""
        for path in paths:
            self._sizes.setdefault(path, _parameters(model.get_submodule(path)))

    def add(self, path: str, block: nn.Module, tokens: int) -> None:
        """Count a block's run over `tokens` tokens."""
        whole = self._sizes.get(path, 0)
        self.spent += tokens * min(1.0, _parameters(block) / whole if whole else 1.0)
        if self.progress:
            self.progress(int(self.spent / self.tokens), int(self.spent / self.blocks))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
