"""lm-eval tasks by name: from its registry, YAML files, or local MMLU files."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from dropformer.eval.tasks.mmlu import mmlu_group
from dropformer.prune.errors import EvaluationError, reason


@dataclass(frozen=True)
class Found:
    """The named tasks and groups (`tops`), and all tasks in them (`leaves`)."""

    tops: dict[str, Task | Group]

    @property
    def leaves(self) -> dict[str, Task]:
        return {task.task_name: task for top in self.tops.values() for task in leaves_of(top)}

    @property
    def groups(self) -> dict[str, Group]:
        tops = [top for top in self.tops.values() if isinstance(top, Group)]
        return {group.name: group for top in tops for group in (top, *top.get_all_groups())}


def leaves_of(top: Task | Group) -> list[Task]:
    """The tasks in a task or group."""
    return top.get_all_tasks() if isinstance(top, Group) else [top]


def find_tasks(names: Sequence[str], mmlu_data: Path | None = None, include: Path | None = None) -> Found:
    """lm-eval tasks by name: `hellaswag`, `mmlu_anatomy`, a tag, a glob, a YAML file.

    With `mmlu_data`, names that begin with `mmlu` come from that folder. `include` is a folder of further task files.
    Raises EvaluationError for an unknown name, with close matches; for data that needs a network; and for two names
    that contain the same task.
    """
    if not names:
        raise EvaluationError("no task is named; give at least one, such as mmlu or hellaswag")
    tops: dict[str, Task | Group] = {}
    for name in dict.fromkeys(names):
        if mmlu_data is not None and (name == "mmlu" or name.startswith("mmlu_")):
            tops[name] = _local_mmlu(name, mmlu_data)
        else:
            tops |= _from_registry(name, include)
    seen: dict[str, str] = {}
    for top, found in tops.items():
        for leaf in leaves_of(found):
            if seen.setdefault(leaf.task_name, top) != top:
                raise EvaluationError(
                    f"{leaf.task_name} is in both {seen[leaf.task_name]} and {top}; name one of the two"
                )
    return Found(tops)


def _local_mmlu(name: str, folder: Path) -> Task | Group:
    whole = mmlu_group(folder)
    known = {group.name: group for group in (whole, *whole.get_all_groups())}
    known |= {task.task_name: task for task in whole.get_all_tasks()}
    if name not in known:
        raise EvaluationError(f"{folder} has no {name!r}{_nearest(name, known)}")
    return known[name]


def _from_registry(name: str, include: Path | None) -> dict[str, Task | Group]:
    """One name, glob or file, as lm-eval's own tasks and groups."""
    manager = _manager_for(name, include)
    globbed = manager.match_tasks([name]) if any(c in name for c in "*?[") else [name]
    is_file = Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()
    if not globbed or (name == globbed[0] and name not in manager.all_tasks and not is_file):
        raise EvaluationError(f"lm-eval has no task {name!r}{_nearest(name, manager.all_tasks)}")
    out: dict[str, Task | Group] = {}
    for one in globbed:
        loaded = _load(manager, one)
        below = {sub.name for group in loaded["groups"].values() for sub in group.get_all_groups()}
        inside = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
        out |= {key: group for key, group in loaded["groups"].items() if key not in below}
        out |= {key: task for key, task in loaded["tasks"].items() if key not in inside}
    return out


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], manager.load([name]))
    except EvaluationError:
        raise
    except Exception as error:  # data sets raise any type
        raise EvaluationError(
            f"the data of task {name!r} cannot be loaded ({reason(error, 160)}); without a network, give local MMLU "
            "files by --mmlu-data or a filled Hugging Face cache by HF_HOME"
        ) from error


def _manager_for(name: str, include: Path | None) -> TaskManager:
    """The smallest registry with the name: indexing all of lm-eval's takes seconds."""
    if include is not None and name in _manager(include, defaults=False).all_tasks:
        return _manager(include, defaults=False)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Tolerant)
        if isinstance(config, dict) and "group" not in config:
            return _manager(None, defaults=False)
    return _manager(include, defaults=True)


class _Tolerant(yaml.SafeLoader):
    """Reads a task file's keys; `!function` values, which only lm-eval resolves, become None."""


_Tolerant.add_multi_constructor("!", lambda loader, suffix, node: None)


@lru_cache(maxsize=4)
def _manager(include: Path | None, defaults: bool) -> TaskManager:
    if include is not None and not include.is_dir():
        raise EvaluationError(f"{include} is not a folder; expected one with lm-eval task files (*.yaml)")
    return TaskManager(include_path=str(include) if include else None, include_defaults=defaults)


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(near)}?" if near else "; `lm_eval ls tasks` lists all tasks"
