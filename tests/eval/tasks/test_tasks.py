import copy
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dropformer.eval.tasks.backends import BACKENDS, BackendEntry
from dropformer.eval.tasks.responses import fingerprint, shares
from dropformer.eval.tasks.results import TaskOptions, TaskResults, compare_tasks
from dropformer.eval.tasks.tasks import evaluate_tasks
from dropformer.prune.errors import EvaluationError

ENDINGS = """
task: local_endings
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{data}"}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""

WRITTEN = """
task: local_written
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{data}"}}}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{endings[label]}}}}"
generation_kwargs: {{until: ["the"], max_gen_toks: 6}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="session")
def local_tasks(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(2)
    data = folder / "questions.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for _ in range(16):
            endings = [tiny.sentence(draw, 1, 5) for _ in range(4)]
            row = {"ctx": tiny.sentence(draw, 3, 12), "endings": endings, "label": draw.randrange(4)}
            file.write(json.dumps(row) + "\n")
    for name, text in (("endings", ENDINGS), ("written", WRITTEN)):
        (folder / f"local_{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return folder


def test_mmlu_is_reported_by_subject_by_category_and_as_a_whole(llama, tokenizer, mmlu_data):
    got = evaluate_tasks(llama, tokenizer, ["mmlu"], TaskOptions(shots=2, mmlu_data=mmlu_data))
    assert got.named == ("mmlu",) and got.tasks["mmlu"].questions == 50
    assert got.tasks["mmlu_stem"].members == ("mmlu_anatomy", "mmlu_astronomy")
    right = got.answers("mmlu")
    assert len(right) == 50
    assert got.tasks["mmlu"].value == pytest.approx(sum(right.values()) / 50)
    stem = got.answers("mmlu_stem")
    assert got.tasks["mmlu_stem"].value == pytest.approx(sum(stem.values()) / 32)
    assert 0 < got.tasks["mmlu"].stderr < 0.2
    assert got.stats["computed"] < got.stats["needed"]


def test_both_backends_answer_every_question_alike(llama, tokenizer, mmlu_data, local_tasks):
    names = ["mmlu_anatomy", "local_endings", "local_written"]
    options = {"shots": 0, "mmlu_data": mmlu_data, "include": local_tasks}
    fast = evaluate_tasks(llama, tokenizer, names, TaskOptions(**options))
    slow = evaluate_tasks(llama, tokenizer, names, TaskOptions(**options, backend="hf", batch_size=4))
    assert fast.correct == slow.correct and set(fast.correct) == set(names)
    for name in names:
        assert fast.tasks[name].metrics == slow.tasks[name].metrics
    assert set(fast.tasks["local_endings"].metrics) == {"acc", "acc_norm"}
    assert slow.stats is None


def test_results_survive_their_json(llama, tokenizer, mmlu_data, tmp_path):
    got = evaluate_tasks(llama, tokenizer, ["mmlu_sociology"], TaskOptions(shots=0, mmlu_data=mmlu_data))
    assert TaskResults.read(got.write(tmp_path / "tasks.json")) == got


def test_a_limit_takes_the_same_proportional_sample_every_time(llama, tokenizer, mmlu_data):
    options = TaskOptions(shots=0, mmlu_data=mmlu_data, limit=25, seed=4)
    one = evaluate_tasks(llama, tokenizer, ["mmlu"], options)
    assert one.tasks["mmlu"].questions == 25
    assert {name: len(rows) for name, rows in one.correct.items()} == {
        "mmlu_anatomy": 6,
        "mmlu_astronomy": 10,
        "mmlu_sociology": 5,
        "mmlu_world_religions": 4,
    }
    assert one.correct == evaluate_tasks(llama, tokenizer, ["mmlu"], options).correct
    whole = evaluate_tasks(llama, tokenizer, ["mmlu"], TaskOptions(shots=0, mmlu_data=mmlu_data))
    assert one.answers("mmlu").items() <= whole.answers("mmlu").items()


def test_a_limit_below_the_number_of_subjects_leaves_some_out(llama, tokenizer, mmlu_data):
    got = evaluate_tasks(llama, tokenizer, ["mmlu"], TaskOptions(shots=0, mmlu_data=mmlu_data, limit=2))
    assert got.tasks["mmlu"].questions == 2 and len(got.correct) == 2
    assert all(task.questions for task in got.tasks.values())


def test_a_sample_with_one_question_of_a_subject_has_a_standard_error_too(llama, tokenizer, mmlu_data):
    found = evaluate_tasks(llama, tokenizer, ["mmlu"], TaskOptions(shots=0, mmlu_data=mmlu_data, limit=5))
    assert min(task.questions for task in found.tasks.values()) == 1
    right = sum(found.answers("mmlu").values()) / 5
    assert found.tasks["mmlu"].value == pytest.approx(right)
    assert found.tasks["mmlu"].stderr == pytest.approx((right * (1 - right) / 4) ** 0.5)


def test_two_models_are_compared_question_by_question(llama, tiny, tokenizer, mmlu_data):
    options = TaskOptions(shots=1, mmlu_data=mmlu_data)
    dense = evaluate_tasks(llama, tokenizer, ["mmlu"], options)
    other = evaluate_tasks(tiny.llama(seed=1), tokenizer, ["mmlu"], options)
    paired = compare_tasks(dense, other)
    assert set(paired) == set(dense.tasks)
    whole = paired["mmlu"]
    assert whole.questions == 50 and whole.pruned == pytest.approx(other.tasks["mmlu"].value)
    assert compare_tasks(dense, dense)["mmlu"].retained == 1


def test_answers_are_kept_and_not_computed_again(llama, tiny, tokenizer, mmlu_data, tmp_path):
    options = TaskOptions(shots=1, mmlu_data=mmlu_data, cache=tmp_path)
    first = evaluate_tasks(llama, tokenizer, ["mmlu_anatomy"], options)
    assert first.stats["forwards"] > 0
    again = evaluate_tasks(llama, tokenizer, ["mmlu_anatomy"], options)
    assert again.stats["forwards"] == 0 and again.correct == first.correct
    more = evaluate_tasks(llama, tokenizer, ["mmlu_stem"], options)
    assert more.stats["requests"] == 4 * 20
    other = evaluate_tasks(tiny.llama(seed=1), tokenizer, ["mmlu_anatomy"], options)
    assert other.stats["requests"] == 4 * 12
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("*.db"))
    assert b"\x80\x04" not in kept and b"\x80\x05" not in kept  # how a pickle begins


KILLED = """
import os, signal, sqlite3, sys, time
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from dropformer.eval.tasks.results import TaskOptions
from dropformer.eval.tasks.tasks import evaluate_tasks
folder, mmlu_data, cache = map(Path, sys.argv[1:])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
def die_after_an_answer(*_):
    time.sleep(0.1)  # a forward pass of a real model takes longer
    for file in cache.glob("*.db"):
        if sqlite3.connect(file).execute("select count(*) from unnamed").fetchone()[0]:
            os.kill(os.getpid(), signal.SIGKILL)
model.model.layers[-1].register_forward_hook(die_after_an_answer)
evaluate_tasks(model, tokenizer, ["mmlu"], TaskOptions(shots=1, mmlu_data=mmlu_data, cache=cache))
"""


def test_a_killed_run_goes_on_with_what_is_missing_and_gives_the_same_answers(
    llama, tokenizer, mmlu_data, tmp_path, elsewhere
):
    folder, cache = tmp_path / "model", tmp_path / "answers"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ended = elsewhere(KILLED, folder, mmlu_data, cache)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    whole = evaluate_tasks(llama, tokenizer, ["mmlu"], TaskOptions(shots=1, mmlu_data=mmlu_data))
    resumed = evaluate_tasks(llama, tokenizer, ["mmlu"], TaskOptions(shots=1, mmlu_data=mmlu_data, cache=cache))
    assert 0 < resumed.stats["requests"] < whole.stats["requests"]
    assert resumed.correct == whole.correct and resumed.tasks == whole.tasks


def test_a_changed_weight_changes_the_fingerprint(llama, tokenizer):
    changed = copy.deepcopy(llama)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert fingerprint(llama, tokenizer) == fingerprint(copy.deepcopy(llama), tokenizer)
    assert fingerprint(changed, tokenizer) != fingerprint(llama, tokenizer)


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (["mmlu_anatomi"], {}, "did you mean mmlu_anatomy"),
        (["mmlu", "mmlu_anatomy"], {}, "in both mmlu and mmlu_anatomy"),
        (["mmlu_anatomy"], {"shots": 9}, "has 5 few-shot examples, but 9 were requested"),
        (["mmlu_anatomy"], {"limit": 0}, "at least 1 question"),
        ([], {}, "no task is named"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(llama, tokenizer, mmlu_data, names, options, says):
    with pytest.raises(EvaluationError, match=says) as caught:
        evaluate_tasks(llama, tokenizer, names, TaskOptions(**{"mmlu_data": mmlu_data, **options}))
    assert "\n" not in str(caught.value)


def test_data_that_cannot_be_loaded_is_an_error_of_one_line(llama, tokenizer, tmp_path):
    (tmp_path / "gone.yaml").write_text(ENDINGS.format(data=tmp_path / "missing.jsonl"), encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"cannot be loaded.*--mmlu-data") as caught:
        evaluate_tasks(llama, tokenizer, [str(tmp_path / "gone.yaml")])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_unknown_name_is_answered_with_the_nearest_ones(llama, tokenizer):
    with pytest.raises(EvaluationError, match=r"did you mean .*hellaswag"):
        evaluate_tasks(llama, tokenizer, ["helaswag"])


def test_processes_get_even_runs_that_keep_a_question_whole():
    texts = [f"subject {i % 7} question {i // 4:03d} {'x' * (i // 4 % 9)}" for i in range(280)]
    parts = shares(texts, 3)
    assert sorted(i for part in parts for i in part) == list(range(280))
    assert all(len(part) > 80 for part in parts)
    owners = {}
    for rank, part in enumerate(parts):
        for i in part:
            assert owners.setdefault(texts[i], rank) == rank
    assert sum(map(len, shares(["one"], 4))) == 1


LAUNCHED = """
import os, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from dropformer.eval.tasks.results import TaskOptions
from dropformer.eval.tasks.tasks import evaluate_tasks

folder, data, out = map(Path, sys.argv[1:])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
options = TaskOptions(shots=2, mmlu_data=data, limit=21)
results = evaluate_tasks(model, tokenizer, ["mmlu"], options)
results.write(out / f"{os.environ['RANK']}.json")
"""


@pytest.mark.slow  # --multi_gpu starts two processes on a CPU too; --cpu would start one
def test_two_processes_give_the_answers_of_one(llama, tokenizer, mmlu_data, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "run.py").write_text(LAUNCHED, encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]
    arguments = [tmp_path / "run.py", tmp_path / "model", mmlu_data, tmp_path]
    command = [*launch, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one = evaluate_tasks(llama, tokenizer, ["mmlu"], TaskOptions(shots=2, mmlu_data=mmlu_data, limit=21))
    both = [TaskResults.read(Path(tmp_path / f"{rank}.json")) for rank in (0, 1)]
    assert both[0].correct == both[1].correct == one.correct
    assert both[0].tasks == one.tasks
    assert sum(part.stats["requests"] for part in both) == 84 and min(p.stats["requests"] for p in both) > 0


def test_a_backend_from_the_registry_answers(llama, tokenizer, local_tasks):
    made = []

    def make_toy(model, tokenizer, **options):
        made.append(options)
        return BACKENDS["fast"].method()(model, tokenizer, **options)

    with BACKENDS.having("toy", BackendEntry("a toy", make_toy)):
        toy = evaluate_tasks(llama, tokenizer, ["local_endings"], TaskOptions(include=local_tasks, backend="toy"))
    fast = evaluate_tasks(llama, tokenizer, ["local_endings"], TaskOptions(include=local_tasks))
    assert made == [{"batch_size": None}] and toy.backend == "toy" and toy.correct == fast.correct
