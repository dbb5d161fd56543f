"""Options and results of tasks.  Does not import lm-eval, which only running tasks needs (`tasks`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dropformer.eval.tasks.paired import Paired, compare
from dropformer.prune.artifact import Artifact, FrozenRecord


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run.

    shots: few-shot examples, None for each task's own. limit: questions per named task or group, drawn by `seed` in
    proportion to its parts. mmlu_data: folder of MMLU's CSV files. include: folder of further task files. backend: a
    name in `backends.BACKENDS`. batch_size: prompts per batch in generation, and with "hf" also in scoring (None:
    chosen automatically). cache: folder of cached answers, from which an interrupted run resumes. lm: further
    arguments of lm-eval's hf model.
    """

    shots: int | None = None
    limit: int | None = None
    seed: int = 0
    mmlu_data: Path | None = None
    include: Path | None = None
    backend: str = "fast"
    batch_size: int | None = None
    cache: Path | None = None
    lm: Mapping[str, Any] | None = None


class Metric(FrozenRecord):
    """A metric and its standard error, if lm-eval has one."""

    value: float | None
    stderr: float | None = None


class TaskResult(FrozenRecord):
    """One task or group. `metric` names the first of its `metrics`; a group's `members` are its parts."""

    name: str
    alias: str
    questions: int
    metric: str
    metrics: dict[str, Metric]
    higher_is_better: bool = True
    shots: int | None = None
    members: tuple[str, ...] = ()

    @property
    def value(self) -> float | None:
        return self.metrics[self.metric].value if self.metrics else None

    @property
    def stderr(self) -> float | None:
        return self.metrics[self.metric].stderr if self.metrics else None


class TaskResults(Artifact):
    """Results of `evaluate_tasks`: the named tasks and groups first, then their members.

    correct[task][question]: whether the answer is correct by the task's metric, for tasks with a 0/1 metric.
    stats: tokens computed and needed, of the fast backend.
    """

    kind: ClassVar[str] = "tasks"

    named: tuple[str, ...]
    tasks: dict[str, TaskResult]
    correct: dict[str, dict[int, bool]]
    backend: str
    lm_eval: str
    seed: int
    limit: int | None = None
    stats: dict[str, int] | None = None

    def answers(self, name: str) -> dict[tuple[str, int], bool]:
        """Correctness by (task, question) of a task, or of all tasks in a group."""
        members = self.tasks[name].members
        if members:
            return {key: right for member in members for key, right in self.answers(member).items()}
        return {(name, question): right for question, right in self.correct.get(name, {}).items()}


def compare_tasks(dense: TaskResults, pruned: TaskResults) -> dict[str, Paired]:
    """Paired comparison of each task and group with a 0/1 metric.

    Raises EvaluationError unless both models answered the same questions.
    """
    names = [name for name in dense.tasks if name in pruned.tasks and dense.answers(name)]
    return {name: compare(dense.answers(name), pruned.answers(name)) for name in names}
