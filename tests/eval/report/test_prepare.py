"""What an evaluation cannot do is said before anything is measured."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from dropformer.eval.cost.timing import Setting
from dropformer.eval.report.evaluation import Candidate, EvaluationOptions, evaluate
from dropformer.eval.report.prepare import labels
from dropformer.metrics.calibration.settings import Calibration
from dropformer.progress import Silent
from dropformer.prune.errors import ArchitectureError, CalibrationError, EvaluationError, ModelError

TEXT = Calibration("heldout", 2, 32)


class Heard(Silent):
    """Fails the test if any work begins."""

    def stage(self, name, total=None):
        raise AssertionError(f"{name} has begun")


def refused(candidates, options, error, said):
    with pytest.raises(error, match=said):
        evaluate(candidates, options, Heard())


def test_filling_a_gpu_is_refused_without_one(llama, tokenizer):
    options = EvaluationOptions(text=TEXT, speed=(Setting(8, 8, "max"),))
    refused([Candidate("a", llama, tokenizer)], options, EvaluationError, "paper")


def test_a_prompt_longer_than_the_context_is_refused(llama, tokenizer):
    options = EvaluationOptions(text=TEXT, speed=(Setting(1024, 1, 1),))
    refused([Candidate("a", llama, tokenizer)], options, EvaluationError, "1025 tokens .* context of a, 1024")


def test_models_of_two_vocabularies_are_refused(llama, tiny, tokenizer):
    candidates = [Candidate("a", llama, tokenizer), Candidate("b", tiny.llama(vocab_size=401), tokenizer)]
    refused(candidates, EvaluationOptions(text=TEXT), EvaluationError, "a has 400 tokens and b 401")


def test_windows_longer_than_the_context_are_refused(llama, tokenizer):
    options = EvaluationOptions(text=Calibration("heldout", 1, 1025))
    refused([Candidate("a", llama, tokenizer)], options, EvaluationError, "1025 tokens .* --stream")


def test_a_model_whose_tokenizer_gives_other_ids_is_refused(llama, tiny, tokenizer):
    candidates = [Candidate("a", llama, tokenizer), Candidate("b", llama, tiny.tokenizer(bos=True))]
    refused(candidates, EvaluationOptions(text=TEXT), ModelError, "b cannot be compared with a: its tokenizer")


def test_a_model_without_a_tokenizer_is_refused(llama):
    refused([Candidate("a", llama, None)], EvaluationOptions(text=TEXT), EvaluationError, "no tokenizer")


def test_a_model_that_cannot_stream_is_refused(tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4)).eval()
    options = EvaluationOptions(text=TEXT, stream=64)
    refused([Candidate("a", model, tokenizer)], options, ArchitectureError, "cannot stream")


def test_a_text_shorter_than_the_stream_is_refused(llama, tokenizer):
    options = EvaluationOptions(text=TEXT, stream=10**8)
    refused([Candidate("a", llama, tokenizer)], options, CalibrationError, "100000000")


def test_no_two_models_have_one_name():
    assert labels(["org/llama@main", "x.gguf"]) == ["llama", "x"]
    assert labels(["a/llama", "b/llama", "a/llama"]) == ["a/llama", "b/llama", "a/llama #2"]


def test_evaluating_without_tasks_imports_no_lm_eval(elsewhere):
    code = """import sys
import dropformer.commands, dropformer.eval.report.evaluation, dropformer.eval.report.page, dropformer.job
print([name for name in ("lm_eval", "datasets") if name in sys.modules])
"""
    done = elsewhere(code)
    assert done.stdout.strip() == "[]", done.stderr
