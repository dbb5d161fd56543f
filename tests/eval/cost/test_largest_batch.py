"""The largest batch is found by trials whose number stays small, and from a guess by memory."""

import pytest
import torch

from dropformer.eval.cost.largest_batch import largest_batch, with_batch
from dropformer.eval.cost.memory import kv_bytes_per_token
from dropformer.eval.cost.timing import Setting
from dropformer.prune.errors import EvaluationError


def trials(limit, guess):
    tried = []
    return largest_batch(lambda batch: tried.append(batch) or batch <= limit, guess), tried


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 11, 12, 23, 100, 1000])
@pytest.mark.parametrize("guess", [1, 16, 90, 4096])
def test_the_largest_batch_fits_and_one_an_eighth_larger_does_not(limit, guess):
    found, tried = trials(limit, guess)
    assert found <= limit < found + max(1, found // 8) + 1
    assert len(tried) <= 18


def test_batches_between_powers_of_two_are_found():
    assert trials(11, 1) == (11, [1, 2, 4, 8, 16, 12, 10, 11])


def test_a_good_guess_saves_trials():
    assert len(trials(97, 100)[1]) < len(trials(97, 1)[1])


@pytest.mark.parametrize("guess", [0, 1, 64])
def test_nothing_fits_is_zero(guess):
    assert trials(0, guess)[0] == 0


def test_the_papers_setting_takes_the_batch_that_memory_allows(tiny, monkeypatch):
    seen = []

    def fits(model, setting, ballast):
        seen.append((setting.batch, ballast))
        return setting.batch <= 21

    where = "dropformer.eval.cost.largest_batch."
    monkeypatch.setattr(where + "gpus_of", lambda model: [torch.device("cuda:0")])
    model = tiny.llama()
    token = kv_bytes_per_token(model)
    monkeypatch.setattr(where + "free_bytes", lambda device: 24 * 4096 * token)
    monkeypatch.setattr(where + "fits_in_memory", fits)
    found = with_batch({"dense": model}, Setting(2048, 2048, "max"))
    assert 19 <= found.batch <= 21
    assert seen[0][0] == 22  # the KV cache alone says 24, less some headroom
    assert seen[0][1] >= 22 * 2048 * token  # the cache still to grow is held beside the trial
    seen.clear()
    with_batch({"a": model, "b": model}, Setting(2048, 2048, "max"), static=True)
    assert seen[0][1] >= seen[0][0] * (2048 + 4096) * token  # the other model's whole cache too


def test_batch_max_over_several_gpus_is_refused(tiny, monkeypatch):
    gpus = [torch.device("cuda:0"), torch.device("cuda:1")]
    monkeypatch.setattr("dropformer.eval.cost.largest_batch.gpus_of", lambda model: gpus)
    with pytest.raises(EvaluationError, match="on several; give a number"):
        with_batch({"dense": tiny.llama()}, Setting(8, 8, "max"))
