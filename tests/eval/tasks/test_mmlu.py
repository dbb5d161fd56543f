import os
import shutil
from pathlib import Path

import pytest

from dropformer.eval.tasks.mmlu import mmlu_group, mmlu_subjects, read_csv
from dropformer.prune.errors import EvaluationError


def real_data() -> Path:
    beside = Path(__file__).parents[3].parent / "shared" / "data"
    folder = Path(os.environ.get("DROPFORMER_DATA", beside)) / "mmlu"
    if not folder.is_dir():
        pytest.skip("the real MMLU is not on this machine")
    return folder


def requests(task, shots, limit=None):
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def leaf(group, name):
    return next(task for task in group.get_all_tasks() if task.task_name == name)


def test_the_prompt_is_that_of_lm_eval_word_for_word(tmp_path):
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        path = tmp_path / split / f"anatomy_{split}.csv"
        path.write_text(f'" Which {split}, then? ",one,two,"three, or four",4,C\n', encoding="utf-8")
    asked = requests(leaf(mmlu_group(tmp_path), "mmlu_anatomy"), shots=1)
    prompt = (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Which dev, then?\nA. one\nB. two\nC. three, or four\nD. 4\nAnswer: C\n\n"
        "Which test, then?\nA. one\nB. two\nC. three, or four\nD. 4\nAnswer:"
    )
    assert asked == [(prompt, f" {letter}") for letter in "ABCD"]


def test_subjects_stand_in_the_categories_of_lm_eval(mmlu_data):
    whole = mmlu_group(mmlu_data)
    found = {group.name: group.child_names for group in whole.get_all_groups()}
    assert found == {
        "mmlu_humanities": ["mmlu_world_religions"],
        "mmlu_social_sciences": ["mmlu_sociology"],
        "mmlu_stem": ["mmlu_anatomy", "mmlu_astronomy"],
    }
    assert whole.has_aggregation and all(group.has_aggregation for group in whole.get_all_groups())


def test_the_real_mmlu_has_57_subjects_and_14042_questions():
    whole = mmlu_group(real_data())
    tasks = whole.get_all_tasks()
    assert len(tasks) == 57 and sum(len(task.eval_docs) for task in tasks) == 14042
    assert [len(group.get_all_tasks()) for group in whole.get_all_groups()] == [13, 13, 12, 19]
    asked = requests(leaf(whole, "mmlu_college_physics"), shots=5, limit=1)
    assert len(asked) == 4 and asked[0][0].count("Answer:") == 6


def test_a_row_that_is_no_question_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "anatomy_test.csv"
    path.write_text('fine,a,b,c,d,A\n"two\nlines",a,b,c,d,B\nbad,a,b,c,E\n', encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"anatomy_test\.csv:4 is not a question"):
        read_csv(path, "anatomy")


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="original layout"):
        mmlu_subjects(tmp_path)


def test_an_unknown_subject_is_refused_with_the_nearest_one(mmlu_data, tmp_path):
    shutil.copytree(mmlu_data, tmp_path / "copy")
    test = tmp_path / "copy" / "test"
    (test / "anatomy_test.csv").rename(test / "anatomi_test.csv")
    with pytest.raises(EvaluationError, match="did you mean 'anatomy'"):
        mmlu_subjects(tmp_path / "copy")
