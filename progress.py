"""How long work reports what it does, whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Tell = Callable[[str], None]
"""Takes one line of text for a person."""

Tick = Callable[[int, int], None]
"""Takes how much of a stage is done, and a second count to show beside it, such as tokens."""


class Progress(Protocol):
    """Shows what a run does; the command line draws it, a script may ignore it."""

    def say(self, text: str) -> None:
        """One line about what happens now."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Tick]:
        """A piece of long work of `total` steps, None where they are not counted."""


class Silent:
    """The progress of a run that nobody watches."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Tick]:
        yield lambda done, count: None
