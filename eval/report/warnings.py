"""Warnings of an evaluation: a cliff, a probe whose accuracy falls, a test that cannot show a loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dropformer.eval.report.results import ModelResult

CLEAR = 2.0  # standard errors that a fall, or a distance from chance, must exceed
LEAST = 0.05  # smallest fall in accuracy to report
FAR = 0.005  # smallest extra loss far into a text to report, in nats
MMLU_CHANCE = 0.25


def warnings(results: Sequence[ModelResult]) -> list[str]:
    """One line per warning; none without a pruned model."""
    if len(results) < 2:
        return []
    return [*_cliffs(results), *_falls(results), *_far_losses(results), *_knowledge(results)]


def _cliffs(results: Sequence[ModelResult]) -> Iterator[str]:
    return (f"{result.name}: {result.trend}" for result in results if result.trend and result.trend.cliff is not None)


def _falls(results: Sequence[ModelResult]) -> Iterator[str]:
    dense = {probe["name"]: probe for probe in results[0].probes}
    for result in results[1:]:
        for probe in result.probes:
            before = dense.get(probe["name"], probe)
            fall = before["accuracy"] - probe["accuracy"]
            if fall > LEAST and fall > CLEAR * (before["stderr"] ** 2 + probe["stderr"] ** 2) ** 0.5:
                yield f"{result.name}: the {probe['name']} probe falls from {_percent(before)} to {_percent(probe)}"
    if dense and "needle" not in dense:
        yield f"the needle probe was left out: its text is longer than the context of {results[0].name}"
    guessed = [name for name, probe in dense.items() if probe["accuracy"] - probe["chance"] < CLEAR * probe["stderr"]]
    if guessed:
        yield f"{results[0].name} is at chance on the probes {', '.join(guessed)}, so they cannot show a loss"


def _far_losses(results: Sequence[ModelResult]) -> Iterator[str]:
    """Models that lose more at positions beyond their windows (or 1,024 tokens) than at those within."""
    for result in results[1:]:
        beyond = result.long["beyond"] if result.long else None
        if not beyond:
            continue
        within, past = beyond["within"], beyond["past"]
        more = past["lost"] - within["lost"]
        if more > FAR and more > CLEAR * math.hypot(within["stderr"] or 0.0, past["stderr"] or 0.0):
            name = "its windows of attention" if beyond["window"] else "the first tokens"
            yield (
                f"{result.name}: positions beyond {name} ({past['start']:,} tokens) lose {past['lost']:.3f} nats per "
                f"token, those within {within['lost']:.3f}: long texts lose more than short ones show"
            )


def _knowledge(results: Sequence[ModelResult]) -> Iterator[str]:
    tasks = results[0].tasks
    if tasks is None:
        return
    names = [name for name in tasks.named if name.startswith("mmlu")]
    for name in names:
        found = tasks.tasks[name]
        if found.value is not None and found.value < MMLU_CHANCE + CLEAR * (found.stderr or 0.0):
            yield (
                f"{results[0].name} is near chance on {name} ({found.value:.1%}, guessing gives {MMLU_CHANCE:.0%}), "
                "so it cannot show a loss"
            )
    if names:
        yield (
            "MMLU degrades later than generation, arithmetic and long context: judge a drop by perplexity and the "
            + ("probes too" if results[0].probes else "probes too, which were skipped")
        )


def _percent(probe: dict[str, Any]) -> str:
    return f"{probe['accuracy']:.0%}"
