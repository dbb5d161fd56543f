import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from dropformer.api import drop, outline, plan_unscored
from dropformer.eval.tasks import backend
from dropformer.eval.tasks.backend import FastLM
from dropformer.eval.tasks.mmlu import mmlu_group
from dropformer.eval.tasks.packing import Limits
from dropformer.prune.artifact import ModelRef
from dropformer.prune.errors import EvaluationError
from dropformer.recipes import open_source


def instances(pairs, kind="loglikelihood"):
    return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(pairs)]


def mmlu_pairs(folder, shots=5):
    pairs = []
    for task in mmlu_group(folder).get_all_tasks():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(rank=0, world_size=1)
        pairs += [instance.args for instance in task.instances]
    return pairs


def endings_pairs(sentence, questions=25, shots=3):
    """HellaSwag's shape: one context, four endings of many tokens; one context ends in a space."""
    draw = random.Random(5)
    stem = "\n\n".join(sentence(draw, 20, 30) for _ in range(shots))
    pairs = []
    for i in range(questions):
        context = f"{stem}\n\n{sentence(draw, 5, 40)}" + (" " if i == 3 else "")
        pairs += [(context, " " + sentence(draw, 1, 12)) for _ in range(4)]
    return pairs


def zero_shot_pairs(sentence, count=60):
    draw = random.Random(6)
    pairs = [(sentence(draw, 1, 60), " " + sentence(draw, 1, 6)) for _ in range(count)]
    return [*pairs, ("", "the bone"), (pairs[0][0], pairs[0][1])]


def hf(model, tokenizer, **options):
    return HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=4, **options)


def assert_same(fast, slow, pairs):
    ours = fast.loglikelihood(instances(pairs), disable_tqdm=True)
    theirs = slow.loglikelihood(instances(pairs), disable_tqdm=True)
    for (one, greedy), (two, as_greedy) in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, abs=1e-3) and greedy == as_greedy
    return ours


SHAPES = {
    "five-shot MMLU": lambda folder, sentence: mmlu_pairs(folder),
    "endings of many tokens": lambda folder, sentence: endings_pairs(sentence),
    "zero-shot of all lengths": lambda folder, sentence: zero_shot_pairs(sentence),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limits", [Limits(64, 16), Limits(2048, 32)], ids=["small rows", "large rows"])
def test_log_likelihoods_are_those_of_lm_evals_hf_model(shape, limits, llama, tokenizer, mmlu_data, tiny):
    pairs = SHAPES[shape](mmlu_data, tiny.sentence)
    fast = FastLM(llama, tokenizer, limits=limits)
    assert fast.scorer.packs
    assert_same(fast, hf(llama, tokenizer), pairs)
    assert fast.stats.computed <= fast.stats.needed
    assert fast.stats.requests == len(pairs)


def test_a_few_shot_prefix_is_computed_once_a_subject(llama, tokenizer, mmlu_data):
    fast = FastLM(llama, tokenizer, limits=Limits(512, 16))
    fast.loglikelihood(instances(mmlu_pairs(mmlu_data)), disable_tqdm=True)
    assert fast.stats.sequences == 50 and fast.stats.requests == 200
    assert fast.stats.logits == 50
    assert fast.stats.computed < fast.stats.needed / 3


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_the_rule_for_the_first_token_is_lm_evals(llama, tiny, add_bos_token):
    with_bos = tiny.tokenizer(bos=True)
    pairs = [*zero_shot_pairs(tiny.sentence, 12), ("<s>the bone", " heart")]
    fast = FastLM(llama, with_bos, add_bos_token=add_bos_token)
    assert_same(fast, hf(llama, with_bos, add_bos_token=add_bos_token), pairs)


def test_long_requests_are_cut_from_the_left_as_lm_eval_cuts_them(llama, tokenizer, tiny):
    pairs = endings_pairs(tiny.sentence, 6) + zero_shot_pairs(tiny.sentence, 20)
    assert_same(FastLM(llama, tokenizer, max_length=40), hf(llama, tokenizer, max_length=40), pairs)


def test_rolling_log_likelihoods_are_those_of_lm_eval(llama, tokenizer, tiny):
    draw = random.Random(9)
    texts = instances([(tiny.sentence(draw, n, n),) for n in (3, 30, 200)], "loglikelihood_rolling")
    ours = FastLM(llama, tokenizer, max_length=48).loglikelihood_rolling(texts, disable_tqdm=True)
    theirs = hf(llama, tokenizer, max_length=48).loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=5e-3)


def test_generation_is_that_of_lm_eval(llama, tokenizer, tiny):
    draw = random.Random(3)
    asked = [(tiny.sentence(draw, 3, 20), {"until": ["A"], "max_gen_toks": 8}) for _ in range(6)]
    ours = FastLM(llama, tokenizer).generate_until(instances(asked, "generate_until"), disable_tqdm=True)
    theirs = hf(llama, tokenizer).generate_until(instances(asked, "generate_until"), disable_tqdm=True)
    assert ours == theirs


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("spec", [None, "attn=0,mlp=1"])
def test_generation_behind_a_shared_stem_is_that_of_lm_eval(spec, batch_size, llama, tokenizer, tiny):
    model = drop(llama, plan_unscored(ModelRef(name="tiny"), outline(llama), spec, [], None)) if spec else llama
    draw = random.Random(3)
    stem = tiny.sentence(draw, 40, 40)
    options = {"until": ["A"], "max_gen_toks": 12}
    asked = instances([(f"{stem} {tiny.sentence(draw, 1, 20)}", options) for _ in range(7)], "generate_until")
    fast = FastLM(model, tokenizer, batch_size=batch_size)
    ours = fast.generate_until(asked, disable_tqdm=True)
    slow = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
    assert ours == slow.generate_until(asked, disable_tqdm=True)
    assert fast.stats.forwards == 1 and fast.stats.computed >= 40  # the stem, once


MODELS = {
    "gpt2": lambda tiny: GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    ),
    "mamba, a state and no attention": lambda tiny: MambaForCausalLM(
        MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    ),
    "mistral, a window of 24": lambda tiny: MistralForCausalLM(
        MistralConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=24,
            initializer_range=0.3,
        )
    ),
    "llama, eager attention": lambda tiny: tiny.llama(attn_implementation="eager"),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_architectures_agree_whether_rows_can_be_packed_or_not(name, tokenizer, tiny):
    torch.manual_seed(0)
    model = MODELS[name](tiny).eval()
    fast = FastLM(model, tokenizer)
    assert fast.scorer.packs == ("mamba" not in name)
    assert_same(fast, hf(model, tokenizer), endings_pairs(tiny.sentence, 4, 1) + zero_shot_pairs(tiny.sentence, 10))


def test_a_model_that_cannot_pack_says_why(tokenizer, tiny, caplog):
    fast = FastLM(MODELS["mamba, a state and no attention"](tiny), tokenizer)
    assert fast.scorer.why_not and fast.scorer.why_not in caplog.text


def test_requests_are_taken_in_slices_and_answered_in_order(llama, tokenizer, mmlu_data, monkeypatch):
    pairs = mmlu_pairs(mmlu_data, shots=1)
    whole = FastLM(llama, tokenizer).loglikelihood(instances(pairs), disable_tqdm=True)
    monkeypatch.setattr(backend, "AT_ONCE", 30)
    sliced = FastLM(llama, tokenizer).loglikelihood(instances(pairs), disable_tqdm=True)
    assert [one for one, _ in sliced] == pytest.approx([one for one, _ in whole], abs=1e-4)


@pytest.mark.real
def test_smollm2_answers_real_questions_as_under_hf():
    folder = open_source("smollm2-135m").path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shot = "Question: What is 2 + 3?\nAnswer: five\n\n"
    asked = ["What is the capital of France?", "Which planet is the largest?", "Who wrote Hamlet?"]
    answers = [" Paris", " Jupiter", " William Shakespeare, in 1600"]
    pairs = [(f"{shot * 3}Question: {q}\nAnswer:", a) for q in asked for a in answers]
    fast = FastLM(model, tokenizer)
    found = assert_same(fast, hf(model, tokenizer), pairs)
    assert [max(range(3), key=lambda i: found[3 * q + i][0]) for q in range(2)] == [0, 1]


def test_without_packing_short_requests_are_padded_to_long_ones(llama, tokenizer, tiny):
    packed, padded = FastLM(llama, tokenizer), FastLM(llama, tokenizer, pack=False)
    for lm in (packed, padded):
        lm.loglikelihood(instances(zero_shot_pairs(tiny.sentence)), disable_tqdm=True)
    assert packed.stats.computed <= packed.stats.needed < padded.stats.computed


def test_a_continuation_longer_than_the_context_is_refused(llama, tokenizer):
    with pytest.raises(EvaluationError, match="at most 4 to score"):
        FastLM(llama, tokenizer, max_length=4).loglikelihood(
            instances([("the", " bone heart nerve light star planet law")]), disable_tqdm=True
        )


@pytest.mark.parametrize("spec", ["attn=0", "attn=1,2", "attn=0,mlp=1,block=2"])
def test_pruned_models_are_packed_and_agree_too(spec, llama, tokenizer, mmlu_data, tiny):
    plan = plan_unscored(ModelRef(name="tiny"), outline(llama), spec, [], None)
    pruned = drop(llama, plan)
    fast = FastLM(pruned, tokenizer, limits=Limits(96, 16))
    assert fast.scorer.packs
    pairs = mmlu_pairs(mmlu_data, shots=2)[:80] + endings_pairs(tiny.sentence, 6, 1)
    assert_same(fast, hf(pruned, tokenizer), pairs)


def test_generation_takes_as_many_prompts_at_once_as_fit(llama, monkeypatch):
    from dropformer.eval.cost.memory import kv_bytes_per_token
    from dropformer.eval.tasks import backend
    from dropformer.metrics.calibration.batching import activation_bytes

    assert backend.prompts_at_once(llama, 1000) == backend.TOGETHER_CPU
    each = 1000 * (activation_bytes(llama, 1000) + kv_bytes_per_token(llama))
    monkeypatch.setattr(backend, "gpus_of", lambda model: [torch.device("cuda:0")])
    for room, expected in ((6.5, 3), (1e6, backend.TOGETHER_GPU), (0.1, 1)):
        monkeypatch.setattr(backend, "free_bytes", lambda gpu, room=room: int(room * each))
        assert backend.prompts_at_once(llama, 1000) == expected
