"""How a long job tells what it does, whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watcher:
    """Hears what the job does; the command line shows it, a script may ignore it."""

    def say(self, text: str) -> None:
        """One line about what happens now."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
        """A piece of long work; the callback takes how much is done, and a second count to show beside it."""
        yield lambda done, count: None
