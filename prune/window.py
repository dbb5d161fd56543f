"""A window of attention: how many of the last tokens a layer sees, and how many of the first."""

from __future__ import annotations

from dataclasses import dataclass

from dropformer.prune.errors import PlanError

FOLD = "fold"
CONTEXT = 8192  # tokens at which a plan with windows says what its cache holds
KV_AT = f"kv_bytes_at_{CONTEXT}_tokens"  # the key of that in dropformer.json


@dataclass(frozen=True, order=True)
class Window:
    """The last `width` tokens, the token itself included, and the first `sinks` (attention sinks, arXiv 2309.17453).

    `fold`: in place of sinks in the cache, what they give on average: a logit per head and a value per key-value head.
    Prints as people write it: `1024+4`, `1024+fold`.
    """

    width: int
    sinks: int = 0
    fold: bool = False

    def __str__(self) -> str:
        return f"{self.width}+fold" if self.fold else f"{self.width}+{self.sinks}" if self.sinks else str(self.width)

    @classmethod
    def parse(cls, text: str) -> Window:
        """`1024+4` -> Window(1024, 4).  Raises PlanError for a window that holds no token, or no text of one."""
        width, _, sinks = text.partition("+")
        if width.isdecimal() and int(width) and sinks == FOLD:
            return cls(int(width), fold=True)
        if not width.isdecimal() or not (sinks or "0").isdecimal() or not int(width):
            raise PlanError(
                f"window `{text}` cannot be read; expected tokens and sinks, for example 1024+4 or 1024+fold"
            )
        return cls(int(width), int(sinks or 0))

    def held(self, context: int) -> int:
        """Tokens in the layer's KV cache once `context` tokens were read."""
        return min(context, self.width + self.sinks)
