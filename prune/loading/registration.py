"""Make `import dropformer` enough for transformers' Auto classes, without importing transformers.

Registering needs transformers, whose import takes seconds.  So it waits: when the module that holds
AutoConfig has been imported, by anyone, one entry is added to its registry; reading a pruned
checkpoint's config then imports `modeling`.  Nothing of transformers is replaced.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


class PrunedConfig:
    """Stands in transformers' registry for `modeling.DropformerConfig` until a checkpoint needs it."""

    model_type = "dropformer"

    @classmethod
    def from_dict(cls, fields: dict[str, Any], **kwargs: Any) -> Any:
        from dropformer.prune.loading.modeling import DropformerConfig

        return DropformerConfig.from_dict(fields, **kwargs)


def _register(auto: ModuleType) -> None:
    auto.CONFIG_MAPPING.register(PrunedConfig.model_type, PrunedConfig, exist_ok=True)


def register_when_transformers_loads() -> None:
    """Register pruned models now if the Auto classes are there, else as soon as they are."""
    if AUTO in sys.modules:
        _register(sys.modules[AUTO])
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """Sees the import of AUTO, lets the real finders do it, and registers after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)  # seen once; the real finders answer now
        spec = importlib.util.find_spec(name)
        if spec and spec.loader:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(importlib.abc.Loader):
    """Loads a module as its own loader does, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register(module)
