"""Options of a draft search: workload, and the rungs to choose from.  Light: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from dropformer.eval.cost.hardware import HARDWARE
from dropformer.prune.errors import EvaluationError, PlanError
from dropformer.prune.rungs.drop import Dropped
from dropformer.prune.rungs.registry import parse_rung
from dropformer.prune.rungs.window import Windowed
from dropformer.prune.window import Window

RUNGS = "block,attn,mlp,window:256+4"
COLDEST = 0.01  # temperature but 0; logits over much less overflow
KINDS = ("block", "attn", "mlp")


@dataclass(frozen=True)
class DraftOptions:
    """Where the draft is to be fast, and what it may drop.

    rungs: kinds of layers to drop, and windows; most: the largest number of dropped layers; anyway: write the draft
    even if it does not pay; hardware: `cpu` is this machine, which also times the best draft.
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
    for item in filter(None, text.replace(" ", "").split(",")):
        if item in KINDS:
            found.append(item)
            continue
        rung = parse_rung(item)
        if not isinstance(rung, (Dropped, Windowed)) or (isinstance(rung, Windowed) and rung.window.fold):
            raise PlanError(f"--rungs `{item}` makes no draft; expected drop, {', '.join(KINDS)} or window:W+S")
        found += [rung.window] if isinstance(rung, Windowed) else KINDS
    if not found:
        raise PlanError(f"--rungs names none; expected for example {RUNGS}")
    return sorted(dict.fromkeys(found), key=lambda r: len(KINDS) if isinstance(r, Window) else KINDS.index(r))


def check_options(options: DraftOptions) -> None:
    """Raises PlanError for rungs that make no draft, EvaluationError for unknown hardware or no such temperature."""
    parse_rungs(options.rungs)
    if options.temperature and not (options.temperature >= COLDEST and isfinite(options.temperature)):
        raise EvaluationError(
            f"--temperature {options.temperature} is none; expected 0, which is greedy, or {COLDEST} and more"
        )
    if options.hardware not in ("cpu", *HARDWARE):
        raise EvaluationError(f"hardware `{options.hardware}` is unknown; expected cpu or {', '.join(HARDWARE)}")
