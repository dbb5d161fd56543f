"""Providers of a block's weights: memory, accelerate's offloading, or the checkpoint's files (`from_disk`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from dropformer.prune.architecture import Architecture
from dropformer.prune.loading.device import hooks_of, is_offloaded


class Provider(Protocol):
    """Has the weights of one block at a time on the device that computes it."""

    def enter(self, path: str) -> None:
        """Load a block's weights; those of the previous block may be released."""

    def leave(self) -> None:
        """Release the block that was entered last."""


@dataclass(frozen=True)
class Source:
    """A model whose weights are not in memory: its architecture, a copy on the meta device to trace, and a provider."""

    architecture: Architecture
    blueprint: nn.Module
    provider: Provider


class InMemory:
    """All weights are in memory."""

    def enter(self, path: str) -> None:
        pass

    def leave(self) -> None:
        pass


class Offloaded:
    """A model partly offloaded by accelerate: a block's weights are moved once for all batches, not for each call."""

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
                    hook.offload = False  # a call does not move them again
                    self._in.append((module, hook))

    def leave(self) -> None:
        for module, hook in self._in:
            hook.offload = True
            hook.post_forward(module, None)
        self._in, self._path = [], ""


def provider_for(model: nn.Module) -> Provider:
    """The provider of a loaded model."""
    return Offloaded(model) if is_offloaded(model) else InMemory()
