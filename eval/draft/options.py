"""What a draft is to be good at, and on which rungs it is sought.  Light: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from dropformer.prune.errors import PlanError
from dropformer.prune.window import Window

RUNGS = "block,attn,mlp,window:256+4"
KINDS = ("block", "attn", "mlp")


@dataclass(frozen=True)
class DraftOptions:
    """rungs: kinds that may go, and windows; most: layers that may go at most; anyway: written even if it does not pay.

    hardware: `cpu` is this machine, on which the draft that is found is timed too.
    """

    context: int = 4096
    batch: int = 1
    most: int | None = None
    rungs: str = RUNGS
    temperature: float = 1.0
    hardware: str = "cpu"
    anyway: bool = False


def parse_rungs(text: str) -> list[str | Window]:
    """`attn,window:512+4` -> ["attn", Window(512, 4)]; kinds in the order in which a search takes them.

    Raises PlanError for anything else.
    """
    found: list[str | Window] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, window = part.partition(":")
        if name == "window" and window:
            found.append(Window.parse(window))
            if found[-1].fold:
                raise PlanError(f"--rungs `{part}` has fitted constants, and a draft shares all of the dense model's")
        elif part in KINDS:
            found.append(part)
        elif part == "drop":
            found += KINDS
        else:
            raise PlanError(f"--rungs `{part}` is unknown; expected drop, {', '.join(KINDS)} or window:W+S, as {RUNGS}")
    if not found:
        raise PlanError(f"--rungs names none; expected for example {RUNGS}")
    return sorted(dict.fromkeys(found), key=lambda r: len(KINDS) if isinstance(r, Window) else KINDS.index(r))
