"""Where a block's weights come from: memory, accelerate's offloading, or the checkpoint's files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from dropformer.prune.architecture import Architecture
from dropformer.prune.loading.device import hooks_of, is_offloaded


class Provider(Protocol):
    """Has the weights of one block at a time where it computes."""

    def enter(self, path: str) -> None:
        """Bring a block's weights; those of the block before may go."""

    def leave(self) -> None:
        """Let go of the block that was entered last."""


@dataclass(frozen=True)
class Source:
    """A model whose weights are not in memory: its architecture, a blueprint on the meta device to trace, and what
    brings each block."""

    architecture: Architecture
    blueprint: nn.Module
    provider: Provider


class InMemory:
    """All weights are where they compute."""

    def enter(self, path: str) -> None:
        pass

    def leave(self) -> None:
        pass


class Offloaded:
    """A model that accelerate has offloaded in part: a block's weights stay on the device while batches pass it.

    accelerate would move them in and out with every call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._in: list[tuple[nn.Module, Any]] = []
        self._path = ""

    def enter(self, path: str) -> None:
        if path == self._path:
            return
        self.leave()
        self._path = path
        for module in self.model.get_submodule(path).modules():
            for hook in hooks_of(module):
                if getattr(hook, "offload", False):
                    hook.pre_forward(module)
                    hook.offload = False  # calls find the weights in place
                    self._in.append((module, hook))

    def leave(self) -> None:
        for module, hook in self._in:
            hook.offload = True
            hook.post_forward(module, None)
        self._in, self._path = [], ""


def provider_for(model: nn.Module) -> Provider:
    """How a model that was loaded whole gives its blocks."""
    return Offloaded(model) if is_offloaded(model) else InMemory()
