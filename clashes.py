"""Options that would have no effect beside others: refused in one line, never ignored.  Light: no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dropformer.prune.errors import DropformerError

if TYPE_CHECKING:
    from dropformer.metrics.search.strategy import Strategy

PLACE = ("device", "dtype", "device_map")
DRAWN = ("samples", "seed", "skip_first")  # which windows are cut, whatever the text
SPOKEN = {"as_json": "json"}  # parameters whose options have other names


@dataclass(frozen=True)
class Command:
    """One call of the main job.

    `given` are the names of the parameters that the user wrote, `better` is what is done beyond one-shot
    similarity; `on_files`: a plan is followed without a model in memory; `images`: calibration is a folder of them.
    """

    given: Collection[str]
    better: Strategy | None = None
    format: str = "dropformer"
    on_files: bool = False
    measure: bool = True
    images: bool = False

    @property
    def select(self) -> str:
        return self.better.select if self.better else "one-shot"

    @property
    def repairs(self) -> bool:
        return bool(self.better and self.better.repair)


@dataclass(frozen=True)
class Rule:
    """Options that do nothing `where` something holds: `why`, and what else one may do than leave them out."""

    where: Callable[[Command], Any]
    options: tuple[str, ...]
    why: str
    advice: str = ""


RULES = (
    Rule(
        lambda c: "memory" in c.given, ("text", "seconds", "measure", "dry_run"),
        "with --memory, which writes a checkpoint and measures nothing",
    ),
    Rule(
        lambda c: not c.better, ("memory",), "where one-shot similarity chooses",
        "add --quality, or give the scores of `prune analyze --memory` with --scores",
    ),
    Rule(
        lambda c: "plan" in c.given, ("keep", "scores", "metric", "select"), "with --plan, which says what goes"
    ),
    Rule(
        lambda c: c.on_files, (*PLACE, "calibration", "length", "text", "seconds"),
        "with --plan, which is followed without a model in memory", "add --measure",
    ),
    Rule(
        lambda c: "plan" in c.given and not c.better, (*DRAWN, "batch_size"),
        "with --plan, for which nothing is scored", "add --repair",
    ),
    Rule(lambda c: c.better, ("scores",), "beside --quality and its like, which measure anew"),
    Rule(
        lambda c: "scores" in c.given, (*DRAWN, "length", "batch_size"),
        "with --scores, which were measured before", "leave out --scores",
    ),
    # a folder of images is also what the outputs of a vision model are compared on
    Rule(
        lambda c: "scores" in c.given and not c.images, ("calibration",),
        "with --scores, which were measured before", "leave out --scores",
    ),
    Rule(
        lambda c: c.better, ("batch_size",),
        "with --quality, --metric, --select, --refine, --budget or --repair, whose windows run one at a time",
    ),
    Rule(lambda c: not c.repairs, ("gate",), "where nothing is repaired", "add --repair"),
    Rule(lambda c: "budget" in c.given, ("metric", "select"), "with --budget, which searches by the KL it costs"),
    Rule(
        lambda c: c.select == "greedy", ("metric",), "where a greedy search chooses, by the KL that it costs",
        "add --select one-shot or iterative",
    ),
    Rule(lambda c: c.format in ("gguf", "onnx"), ("link",), "with --format gguf or onnx, which write a file anew"),
    Rule(lambda c: c.format == "onnx", ("verify",), "with --format onnx, which copies no bytes"),
    Rule(lambda c: not c.measure, ("text", "seconds"), "with --no-measure"),
)  # fmt: skip


def check(command: Command) -> None:
    """Raises DropformerError where an option was given that would be ignored."""
    for rule in RULES:
        idle = [option for option in rule.options if option in command.given]
        if idle and rule.where(command):
            raise DropformerError(f"{_idle(idle)} {rule.why}; {_leave(idle)}{f' or {rule.advice}' * bool(rule.advice)}")


def check_subcommand(given: Collection[str], subcommand: str) -> None:
    """Raises DropformerError where options of the main job stand before a subcommand, which does not see them."""
    if given:
        options = sorted(given)
        raise DropformerError(f"{_idle(options)} before {subcommand}; put options behind {subcommand}")


def check_one_choice(given: Collection[str]) -> None:
    """Raises DropformerError where more than one option says what goes."""
    if len({"drop", "plan", "budget"}.intersection(given)) > 1:
        raise DropformerError("give only one of --drop, --plan and --budget")


def _idle(options: list[str]) -> str:
    flags = ["--" + SPOKEN.get(option, option).replace("_", "-") for option in options]
    listed = " and ".join(filter(None, [", ".join(flags[:-1]), flags[-1]]))
    return f"{listed} {'has' if len(flags) == 1 else 'have'} no effect"


def _leave(options: list[str]) -> str:
    return "leave it out" if len(options) == 1 else "leave them out"
