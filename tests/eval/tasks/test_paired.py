import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dropformer.eval.tasks.paired import compare, mcnemar
from dropformer.eval.tasks.sampling import stratified
from dropformer.prune.errors import EvaluationError


def keyed(answers):
    return {("task", i): bool(a) for i, a in enumerate(answers)}


def test_mcnemar_gives_the_published_exact_values():
    assert mcnemar(6, 0) == pytest.approx(2 / 64)
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(5, 5) == 1 and mcnemar(0, 0) == 1
    assert mcnemar(4000, 4400) == pytest.approx(1.33e-5, rel=0.02)  # no overflow; normal approximation


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_a_probability_and_symmetric(lost, gained):
    p = mcnemar(lost, gained)
    assert 0 < p <= 1 and p == mcnemar(gained, lost)


def test_a_model_against_itself_keeps_everything():
    same = compare(keyed([1, 0, 1, 1]), keyed([1, 0, 1, 1]))
    assert (same.retained, same.retained_stderr, same.p_value, same.difference_stderr) == (1, 0, 1, 0)


def test_equal_answers_say_how_many_might_still_differ():
    same = compare(keyed([1] * 40 + [0] * 17), keyed([1] * 40 + [0] * 17))
    assert (1 - same.unseen) ** 57 == pytest.approx(0.05)
    assert same.kept == "100.0% (no answer of 57 changed; up to 5.1% may, at 95%)"
    assert "±" in compare(keyed([1, 1, 1, 0]), keyed([1, 1, 0, 0])).kept


def test_counts_and_ratio_are_those_of_the_pairs():
    got = compare(keyed([1, 1, 1, 1, 0, 0]), keyed([1, 1, 0, 0, 1, 0]))
    assert (got.lost, got.gained, got.questions) == (2, 1, 6)
    assert got.retained == pytest.approx(3 / 4) and got.difference == pytest.approx(-1 / 6)


def test_standard_errors_are_those_of_a_bootstrap():
    draw = random.Random(0)
    dense = [draw.random() < 0.6 for _ in range(400)]
    pruned = [d if draw.random() < 0.8 else draw.random() < 0.4 for d in dense]
    got = compare(keyed(dense), keyed(pruned))
    ratios, differences = [], []
    for _ in range(3000):
        rows = [draw.randrange(400) for _ in range(400)]
        p, q = sum(dense[i] for i in rows), sum(pruned[i] for i in rows)
        ratios.append(q / p)
        differences.append((q - p) / 400)
    assert got.retained_stderr == pytest.approx(spread(ratios), rel=0.1)
    assert got.difference_stderr == pytest.approx(spread(differences), rel=0.1)


def spread(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def test_nothing_is_retained_of_nothing():
    assert compare(keyed([0, 0]), keyed([0, 1])).retained is None


def test_different_questions_are_not_compared():
    with pytest.raises(EvaluationError, match="same ones"):
        compare({("a", 1): True}, {("a", 2): True})


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 50), min_size=1), st.integers(1, 300))
def test_a_stratified_sample_is_exact_proportional_and_repeats(sizes, limit):
    sample = stratified(sizes, limit, seed=3)
    total = sum(sizes.values())
    assert sum(len(rows) for rows in sample.values()) == min(limit, total)
    assert sample == stratified(sizes, limit, seed=3)
    for name, rows in sample.items():
        assert rows == sorted(set(rows)) and all(0 <= r < sizes[name] for r in rows)
        assert limit >= total or abs(len(rows) - limit * sizes[name] / total) < 1


def test_another_seed_draws_other_questions():
    assert stratified({"a": 100, "b": 60}, 40, 0) != stratified({"a": 100, "b": 60}, 40, 1)
