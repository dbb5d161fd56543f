"""Stopping early: only once another sample of windows would choose the same layers."""

import pytest
import torch

from dropformer.metrics.analysis.analyze import means, proven
from dropformer.metrics.analysis.capture import WindowScores
from dropformer.metrics.analysis.stability import Stopper, resampled, schedule
from dropformer.prune.architecture import Layer
from dropformer.prune.discovery.summarize import summarize


@pytest.fixture
def outlined(tiny):
    model = tiny("llama", num_hidden_layers=6)
    architecture = proven(model)
    return summarize(model, architecture), architecture.layers()


def drawn(layers, centers, noise, windows, tokens=100, seed=0):
    """Rows of windows whose similarity varies by `noise` around `centers` (0.5 where none is given)."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.tensor([centers.get(str(layer), 0.5) for layer in layers], dtype=torch.float64)
    each = center + noise * torch.randn(windows, len(layers), generator=generator, dtype=torch.float64)
    return WindowScores(each * tokens, torch.full((windows, len(layers)), tokens))


CLEAR = {"attn:1": 0.9, "attn:4": 0.9}


def test_a_clear_set_is_settled_at_the_second_check(outlined):
    outline, layers = outlined
    settled = Stopper(outline, layers, "attn:2", 64).settled(drawn(layers, CLEAR, 0.01, 64))
    assert settled.windows == 10 and settled.tokens == 1000 and settled.agreement == 1.0


def test_layers_that_cannot_be_told_apart_are_never_settled(outlined):
    outline, layers = outlined
    assert Stopper(outline, layers, "attn:2", 64).settled(drawn(layers, {}, 0.01, 64)) is None


def test_an_early_answer_is_nearly_always_that_of_the_truth(outlined):
    outline, layers = outlined
    truth, early, wrong = {Layer("attn", 1), Layer("attn", 4)}, 0, 0
    near = {"attn:1": 0.54, "attn:4": 0.54}  # a little above the others: hard for few windows
    for seed in range(8):
        rows = drawn(layers, near, 0.05, 64, seed=seed)
        stopper = Stopper(outline, layers, "attn:2", 64)
        settled = stopper.settled(rows)
        early += settled is not None
        if settled:
            prefix = WindowScores(rows.sums[: settled.windows], rows.tokens[: settled.windows])
            wrong += stopper.agreement(prefix)[0] != truth
    assert early >= 5 and wrong == 0


def test_the_answer_does_not_depend_on_how_many_windows_come_at_once(outlined):
    outline, layers = outlined
    rows = drawn(layers, {"attn:1": 0.56, "attn:4": 0.56}, 0.05, 64)
    whole = Stopper(outline, layers, "attn:2", 64).settled(rows)
    stepwise = Stopper(outline, layers, "attn:2", 64)
    found = (stepwise.settled(WindowScores(rows.sums[:n], rows.tokens[:n])) for n in range(1, 65))
    assert next(answer for answer in found if answer) == whole
    assert 8 < whole.windows < 64


def test_resampling_spreads_as_the_standard_error_says(outlined):
    _, layers = outlined
    rows = drawn(layers, {}, 0.05, 32)
    spread = resampled(rows, 4000).std(0)
    each = rows.sums / rows.tokens
    torch.testing.assert_close(spread, each.std(0) / 32**0.5, rtol=0.1, atol=0)
    torch.testing.assert_close(resampled(rows, 4000).mean(0), means(rows), rtol=0, atol=1e-3)


def test_checks_grow_apart():
    assert list(schedule(30)) == [8, 10, 12, 15, 18, 22, 27]
    assert list(schedule(7)) == []
