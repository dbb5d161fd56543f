"""Progress of long work, as the command line or a script shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Tell = Callable[[str], None]
"""Called with one line of text for the user."""

Tick = Callable[[int, int], None]
"""Called with what is done so far, and a second count: tokens, or the total."""


class Progress(Protocol):
    """Shows the progress of a run."""

    def say(self, text: str) -> None:
        """Show one line about the current work."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Tick]:
        """A stage of `total` steps, None if not counted."""


def silent(_: str) -> None:
    """A `Tell` that shows nothing."""


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Tick]:
        yield lambda done, count: None
