"""Named, ordered choices: formats, metrics, selections, repairs.  Light: an entry is imported when it is first used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

from dropformer.prune.errors import DropformerError, PlanError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Entries by name, in the order in which they apply.  `option` takes a name: --metric, or "probe" in Python."""

    def __init__(self, option: str, entries: dict[str, T], error: type[DropformerError] = PlanError) -> None:
        self.option, self._entries, self._error = option, dict(entries), error

    def __getitem__(self, name: str) -> T:
        """Raises the registry's error for an unknown name."""
        if name not in self._entries:
            raise self._error(f"{self.option} `{name}` is unknown; expected one of {', '.join(self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        """The named entries in the registry's order.  Raises its error for an unknown name."""
        wanted = set(names)
        for name in sorted(wanted):
            self[name]
        return tuple(name for name in self._entries if name in wanted)

    def add(self, name: str, entry: T, before: str | None = None) -> None:
        """Add an entry at the end, or before another.  Raises ValueError for a name that is taken."""
        if name in self._entries:
            raise ValueError(f"{self.option} {name} is taken")
        items = list(self._entries.items())
        at = list(self._entries).index(before) if before else len(items)
        self._entries = dict([*items[:at], (name, entry), *items[at:]])

    @contextmanager
    def having(self, name: str, entry: T, before: str | None = None) -> Iterator[None]:
        """`add` for the length of a `with`."""
        saved = dict(self._entries)
        self.add(name, entry, before)
        try:
            yield
        finally:
            self._entries = saved


def imported(target: Any) -> Any:
    """`package.module:attribute` -> the attribute; anything else as it is."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)
