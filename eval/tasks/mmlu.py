"""MMLU from local CSV files in the original layout, as lm-eval tasks, without a network.

DIR/dev/anatomy_dev.csv and DIR/test/anatomy_test.csv have no header; a row is question, A, B, C, D, letter.
Prompt, few-shot rule and metric are those of lm-eval's `mmlu`, read from its YAML files; only the documents come from
the folder. Categories are lm-eval's: stem, humanities, social_sciences and other, weighted by number of questions.
"""

from __future__ import annotations

import csv
import difflib
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from dropformer.prune.errors import EvaluationError
from dropformer.prune.loading.quiet import quiet_logger

LETTERS = "ABCD"
FEATURES = datasets.Features(
    {
        "question": datasets.Value("string"),
        "subject": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("int64"),
    }
)


def mmlu_subjects(folder: Path) -> list[str]:
    """Subjects that have a test file in `folder`, sorted.

    Raises EvaluationError if there is none, or if one is not a subject of lm-eval's MMLU.
    """
    found = sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv"))
    if not found:
        raise EvaluationError(
            f"{folder} holds no test/SUBJECT_test.csv; expected MMLU's original layout "
            "(dev/SUBJECT_dev.csv and test/SUBJECT_test.csv): give the folder that has both"
        )
    known = {name.removeprefix("mmlu_") for name in _manager().all_subtasks}
    for subject in found:
        if subject not in known:
            near = difflib.get_close_matches(subject, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise EvaluationError(f"{subject!r} in {folder / 'test'} is not an MMLU subject{hint}")
    return found


def mmlu_group(folder: Path) -> Group:
    """lm-eval's group `mmlu` over the subjects in `folder`: tasks `mmlu_SUBJECT`, groups `mmlu_CATEGORY`.

    Raises EvaluationError for a folder without questions and, with file and line, for a malformed row.
    """
    categories: dict[str, list[Task]] = defaultdict(list)
    for subject in mmlu_subjects(folder):
        category, task = _subject_task(folder, subject)
        categories[category].append(task)
    whole = _group("mmlu")
    for category, tasks in sorted(categories.items()):
        group = _group(category)
        for task in tasks:
            group.add(task)
        whole.add(group)
    return whole


def read_csv(path: Path, subject: str) -> list[dict[str, Any]]:
    """Rows of one file as documents: question, subject, four choices, the answer's index.

    Raises EvaluationError, naming the line, for a row that is not question, A, B, C, D, letter.
    """
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        for row in reader:
            if len(row) != 6 or row[5].strip() not in LETTERS or not row[5].strip():
                raise EvaluationError(
                    f"{path}:{reader.line_num} is not a question; expected question,A,B,C,D,letter "
                    f"with a letter of {LETTERS}: correct or remove the row"
                )
            question, *choices, letter = row
            answer = LETTERS.index(letter.strip())
            rows.append({"question": question, "subject": subject, "choices": choices, "answer": answer})
    return rows


def _subject_task(folder: Path, subject: str) -> tuple[str, Task]:
    """The category and lm-eval's own task of one subject, with the documents of `folder`."""
    manager, name = _manager(), f"mmlu_{subject}"
    (category,) = (tag.removesuffix("_tasks") for tag in manager.task_index[name].tags)
    spec = {"group": "mmlu_local", "task": [{"task": name, "custom_dataset": _documents(folder, subject)}]}
    # lm-eval logs a hint on custom data sets, once per subject
    with quiet_logger("lm_eval.api.task"):
        return category, manager.load([spec])["tasks"][name]


def _documents(folder: Path, subject: str) -> Callable[..., datasets.DatasetDict]:
    def documents(**_: Any) -> datasets.DatasetDict:
        splits = {}
        for split in ("dev", "test"):
            path = folder / split / f"{subject}_{split}.csv"
            rows = read_csv(path, subject) if path.exists() else []
            columns = {name: [row[name] for row in rows] for name in FEATURES}
            splits[split] = datasets.Dataset.from_dict(columns, features=FEATURES)
        if not len(splits["test"]):
            raise EvaluationError(f"{folder}/test/{subject}_test.csv is empty: expected at least one question")
        return datasets.DatasetDict(splits)

    return documents


def _group(name: str) -> Group:
    """A copy of lm-eval's group of that name, with alias and weighting but without members."""
    config = dict(_manager().task_index[name].cfg or {})
    return Group.from_config({**config, "task": []})


@lru_cache(maxsize=1)
def _manager() -> TaskManager:
    """Only lm-eval's MMLU: its full registry has 14,000 files and takes seconds to index."""
    folder = Path(lm_eval.tasks.__path__[0]) / "mmlu" / "default"
    return TaskManager(include_path=str(folder), include_defaults=False)
