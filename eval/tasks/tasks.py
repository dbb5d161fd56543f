"""lm-eval tasks, with its registry, prompts and metrics, on a model in memory.

`evaluate_tasks` runs lm-eval tasks by name (`registry`), with the fast backend or lm-eval's own, and records which
questions were answered correctly, for paired comparisons (`paired`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lm_eval
import torch.distributed as dist
from accelerate import PartialState
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dropformer.eval.tasks.backend import FastLM
from dropformer.eval.tasks.backends import BACKENDS
from dropformer.eval.tasks.registry import Found, find_tasks, leaves_of
from dropformer.eval.tasks.responses import RememberingLM, SharingLM, fingerprint
from dropformer.eval.tasks.results import Metric, TaskOptions, TaskResult, TaskResults
from dropformer.eval.tasks.sampling import stratified
from dropformer.progress import Tick
from dropformer.prune.errors import EvaluationError, reason
from dropformer.prune.loading.quiet import quiet_logger


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    options: TaskOptions | None = None,
    progress: Tick | None = None,
) -> TaskResults:
    """Run lm-eval tasks on a causal LM. Processes of one launch split the questions, and each returns all results.

    Raises EvaluationError for an unknown task, missing data, more shots than examples, or a task that this
    kind of model cannot run.
    """
    options = options or TaskOptions()
    _join_launch(model)
    found = find_tasks(tasks, options.mmlu_data, options.include)
    samples = _sample(found, options)
    _set_shots(found, options.shots)
    lm = _language_model(model, tokenizer, options)
    if isinstance(lm, FastLM):
        lm.progress = progress
    remembered = _remembered(lm, model, tokenizer, options)
    evaluated = {name: task for name, task in found.leaves.items() if samples is None or name in samples}
    try:
        with quiet_logger("lm_eval.api.group"):  # warns of group members without questions in a sample
            raw = evaluate(
                _distributed(remembered),
                {"tasks": evaluated, "groups": found.groups},
                samples=samples,
                bootstrap_iters=1000,
            )
    except (ValueError, AssertionError) as error:
        raise EvaluationError(f"lm-eval cannot run {', '.join(tasks)}: {reason(error, 200)}") from error
    finally:
        if isinstance(remembered, RememberingLM):
            remembered.close()
    return _results(raw, found, options, lm)


def _sample(found: Found, options: TaskOptions) -> dict[str, list[int]] | None:
    if options.limit is None:
        return None
    if options.limit < 1:
        raise EvaluationError(f"the limit is {options.limit}; expected at least 1 question")
    samples: dict[str, list[int]] = {}
    for top in found.tops.values():
        sizes = {task.task_name: len(task.eval_docs) for task in leaves_of(top)}
        samples |= stratified(sizes, options.limit, options.seed)
    return samples


def _set_shots(found: Found, shots: int | None) -> None:
    """Set few-shot examples like lm-eval's command: a task with 0 keeps it; the default is 0."""
    for name, task in found.leaves.items():
        own = task.get_config("num_fewshot")
        if shots is not None and own != 0:
            task.set_config("num_fewshot", shots)
        elif own is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        pool = len(task.sampler.df) if getattr(task, "sampler", None) is not None else 0
        if (wanted := task.get_config("num_fewshot")) > pool:
            raise EvaluationError(
                f"{name} has {pool} few-shot examples, but {wanted} were requested; give --shots {pool} or fewer"
            )


def _language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions) -> LM:
    make = BACKENDS[options.backend].method()
    return make(model, tokenizer, batch_size=options.batch_size, **(options.lm or {}))


def _remembered(
    lm: LM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
) -> LM | RememberingLM:
    if options.cache is None:
        return lm
    rank = dist.get_rank() if dist.is_initialized() else 0
    name = f"{fingerprint(model, tokenizer)}-{options.backend}-{rank}.db"
    return RememberingLM(lm, options.cache / name)


def _join_launch(model: PreTrainedModel) -> None:
    """Join the process group of an `accelerate launch` or `torchrun`, if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        PartialState(cpu=model.device.type == "cpu")


def _distributed(lm: Any) -> Any:
    return SharingLM(lm) if dist.is_initialized() and dist.get_world_size() > 1 else lm


def _results(raw: Any, found: Found, options: TaskOptions, lm: LM) -> TaskResults:
    tasks: dict[str, TaskResult] = {}
    for top in found.tops.values():
        groups = [top, *top.get_all_groups()] if isinstance(top, Group) else []
        for group in groups:
            members = [m for m in group.child_names if m in raw["results"] and _counted(raw["results"][m])]
            tasks[group.name] = _result(raw, group.name, members)
    tasks |= {name: _result(raw, name, []) for name in found.leaves if name in raw["results"]}
    named = tuple(name for name in found.tops if name in tasks)
    samples = raw.get("samples", {})
    correct = {name: _correct(samples.get(name, []), tasks[name].metric) for name in found.leaves if name in tasks}
    results = TaskResults(  # type: ignore[call-arg]  # the schema has a default, behind its alias
        named=named,
        tasks={name: task for name, task in tasks.items() if task.questions},
        correct={name: answers for name, answers in correct.items() if answers},
        backend=options.backend,
        lm_eval=lm_eval.__version__,
        seed=options.seed,
        limit=options.limit,
        stats=asdict(lm.stats) if isinstance(lm, FastLM) else None,
    )
    return results.model_copy(update={"tasks": {n: _with_stderr(t, results) for n, t in results.tasks.items()}})


def _with_stderr(task: TaskResult, results: TaskResults) -> TaskResult:
    """Adds a binomial standard error where lm-eval has none, as for a group in which a task has one question."""
    answers = list(results.answers(task.name).values())
    if task.stderr is not None or len(answers) < 2 or task.value is None:
        return task
    right = sum(answers) / len(answers)
    if not math.isclose(right, task.value, abs_tol=1e-6):  # the group is not the mean over its questions
        return task
    metric = Metric(value=task.value, stderr=math.sqrt(right * (1 - right) / (len(answers) - 1)))
    return task.model_copy(update={"metrics": {**task.metrics, task.metric: metric}})


def _counted(row: Mapping[str, Any]) -> bool:
    return bool(row.get("sample_len")) or "acc,none" in row


def _result(raw: Any, name: str, members: Sequence[str]) -> TaskResult:
    row = raw["results"][name]
    found = [key for key in row if "," in key and "_stderr," not in key]
    metrics = {_plain(key): _metric(row, key) for key in found}
    better = raw["higher_is_better"].get(name, {})
    first = next(iter(metrics), "")
    return TaskResult(
        name=name,
        alias=str(row.get("alias") or name).strip(" -"),
        questions=int(row.get("sample_len") or sum(raw["results"][m].get("sample_len", 0) for m in members)),
        metric=first,
        metrics=metrics,
        higher_is_better=bool(better.get(first.split(",")[0], True)),
        shots=raw["n-shot"].get(name) if not members else None,
        members=tuple(members),
    )


def _plain(key: str) -> str:
    """`acc` for lm-eval's `acc,none`; other filters stay, as in `exact_match,strict`."""
    return key.removesuffix(",none")


def _metric(row: Mapping[str, Any], key: str) -> Metric:
    name, kind = key.split(",", 1)
    return Metric(value=_number(row[key]), stderr=_number(row.get(f"{name}_stderr,{kind}")))


def _number(value: Any) -> float | None:
    """The number, or None for lm-eval's "N/A"."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _correct(samples: Sequence[Mapping[str, Any]], metric: str) -> dict[int, bool]:
    """Correctness by question; empty unless the metric is 0 or 1."""
    name, _, kind = metric.partition(",")
    rows = [s for s in samples if s.get("filter", "none") == (kind or "none") and name in s]
    values = {int(s["doc_id"]): s[name] for s in rows}
    if not all(isinstance(v, (bool, int, float)) and v in (0, 1) for v in values.values()):
        return {}
    return {question: bool(v) for question, v in sorted(values.items())}
