"""The rungs by name.  A new one is one file with its class and one entry.  Light: no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dropformer.prune.errors import PlanError
from dropformer.prune.registry import Registry, imported


class Rung(Protocol):
    """A cheaper form of an attention layer.  Prints as `--rungs` takes it."""

    def held(self, context: int) -> int:
        """Tokens in the layer's KV cache once `context` tokens were read."""

    def parameters(self, owned: int) -> int:
        """Parameters that are left of the layer's own."""


@dataclass(frozen=True)
class RungEntry:
    """One rung: `parse` makes it from what follows its name, or is "module:name" of that."""

    summary: str
    parse: str | Callable[[str], Rung]


_HERE = "dropformer.prune.rungs"
RUNGS: Registry[RungEntry] = Registry(
    "rungs",
    {
        "drop": RungEntry("nothing: the residual stream passes", f"{_HERE}.drop:parse"),
        "linear": RungEntry(
            "a linear map with bias in its place (arXiv 2505.21077), fitted on the calibration text",
            f"{_HERE}.linear:parse",
        ),
        "window": RungEntry(
            "the last W tokens and the first S (arXiv 2309.17453), as in window:512+4", f"{_HERE}.window:parse"
        ),
        "agent": RungEntry(
            "N averaged queries between queries and keys of an encoder (arXiv 2312.08874), as in agent:49",
            f"{_HERE}.agent:parse",
        ),
    },
)


def parse_rung(item: str) -> Rung:
    """`window:512+4` -> the rung.  Raises PlanError."""
    name, colon, rest = item.partition(":")
    if name not in RUNGS or bool(colon) != bool(rest):
        raise PlanError(f"--rungs cannot be read at `{item}`; expected for example drop,window:512+4")
    return imported(RUNGS[name].parse)(rest)


def parse_rungs(text: str) -> tuple[Rung, ...]:
    """The rungs of a comma-separated list, each once.  Raises PlanError saying what was expected."""
    found: list[Rung] = []
    for item in text.replace(" ", "").split(","):
        rung = parse_rung(item)
        if rung in found:
            raise PlanError(f"--rungs `{text}` names {item} twice")
        found.append(rung)
    return tuple(found)
