"""Checks of `prune evaluate` that its arguments and files alone can show, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dropformer.eval.tasks.backends import BACKENDS
from dropformer.metrics.calibration.text import check_name
from dropformer.prune.errors import EvaluationError
from dropformer.prune.files.output_paths import check_out
from dropformer.recipes.source import check_model

# parameters whose option has another name
SPOKEN = {"as_json": "json", "include": "include_path", "prompt": "context", "context_tokens": "context"}


@dataclass(frozen=True)
class EvaluationFacts:
    """The arguments of `prune evaluate` that can be checked early; `given` as in a Request."""

    models: Sequence[str]
    tasks: Sequence[str]
    text: str
    backend: str
    mmlu_data: Path | None
    cache: Path | None
    sweep: Path | None
    out: Path | None
    given: frozenset[str] = frozenset()


NEEDED = (  # options of `prune evaluate` that need another one: (needed, dependent options, advice)
    ("tasks", ("shots", "limit", "mmlu_data", "include", "cache"), "name some, as in --tasks mmlu"),
    ("speed", ("batch", "prompt", "repeats", "compile"), "add it"),
    ("stream", ("window",), "give the number of tokens to stream, as in --stream 65536"),
    ("out", ("sweep",), "name a folder for the page"),
)
WITH_DRAFT = (  # all that `prune evaluate --draft` heeds
    *("models", "draft", "text", "samples", "length", "seed", "new_tokens", "dtype", "device", "device_map"),
    *("trust_remote_code", "out", "as_json", "quiet"),
)


def check_draft(facts: EvaluationFacts) -> None:
    """Raises EvaluationError for options that --draft would ignore, and for those that need it."""
    if "draft" not in facts.given:
        if "new_tokens" in facts.given and "speed" not in facts.given:
            raise EvaluationError("--new-tokens has no effect without --speed or --draft; leave it out, or add one")
        return
    if idle := [option for option in sorted(facts.given) if option not in WITH_DRAFT]:
        raise EvaluationError(f"{idle_options(idle)} beside --draft, which measures a draft alone; {leave_out(idle)}")
    if len(facts.models) != 1:
        raise EvaluationError("--draft measures a model with its own draft; name one model")


def validate_evaluation(facts: EvaluationFacts) -> None:
    """Raise the errors of an evaluation that its arguments and files alone can show."""
    check_draft(facts)
    for model in facts.models:
        check_model(model)
    if facts.text:
        check_name(facts.text)
    if facts.out:
        check_out(facts.out, "draft.json" if "draft" in facts.given else "report.html")
    BACKENDS.in_order([facts.backend])
    for option, others, advice in NEEDED:
        idle = [other for other in others if other in facts.given]
        if idle and option not in facts.given:
            raise EvaluationError(f"{idle_options(idle)} without --{option}; {leave_out(idle)}, or {advice}")
    if facts.mmlu_data and not any(name.startswith("mmlu") for name in facts.tasks):
        raise EvaluationError("--mmlu-data serves the tasks mmlu and mmlu_SUBJECT; name one in --tasks")
    if facts.cache and facts.cache.exists() and not facts.cache.is_dir():
        raise EvaluationError(f"--cache {facts.cache} is a file; give a folder for the answers")
    if facts.sweep and not facts.sweep.is_file():
        raise EvaluationError(f"{facts.sweep} does not exist; expected a sweep.json that `prune sweep` wrote")


def idle_options(options: Sequence[str]) -> str:
    """`--shots and --limit have no effect`."""
    flags = ["--" + SPOKEN.get(option, option).replace("_", "-") for option in options]
    listed = " and ".join(filter(None, [", ".join(flags[:-1]), flags[-1]]))
    return f"{listed} {'has' if len(flags) == 1 else 'have'} no effect"


def leave_out(options: Sequence[str]) -> str:
    return "leave it out" if len(options) == 1 else "leave them out"
