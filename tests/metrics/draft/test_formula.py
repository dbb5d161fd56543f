"""The expected speed-up of speculative decoding."""

import pytest
import torch

from dropformer.metrics.draft.formula import best, needed_cost, round_tokens, speedup


def test_a_round_gives_what_drawing_acceptances_gives():
    generator = torch.Generator().manual_seed(0)
    accepted = (torch.rand(20_000, 4, generator=generator) < 0.7).cumprod(1).sum(1) + 1
    assert float(accepted.double().mean()) == pytest.approx(round_tokens(0.7, 4), abs=0.03)


def test_the_formula_is_that_of_the_paper():
    a, g, c = 0.8, 5, 0.2
    assert speedup(a, g, c) == pytest.approx((1 - a ** (g + 1)) / ((1 - a) * (g * c + 1)))
    assert speedup(1.0, 4, 0.25) == 5 / 2


def test_an_acceptance_below_the_cost_never_pays():
    """a < c: even one drafted token loses, (1 + a) / (1 + c)."""
    assert best(0.6, 0.7) == (1, pytest.approx(1.6 / 1.7))


def test_a_dearer_verification_drafts_less():
    free, dear = best(0.9, 0.1), best(0.9, 0.1, lambda tokens: tokens)
    assert dear[0] < free[0] and dear[1] < 1 < free[1]


def test_at_the_needed_cost_the_target_is_reached_and_just_so():
    cost = needed_cost(0.85, 1.05)
    assert best(0.85, cost)[1] == pytest.approx(1.05)
    assert needed_cost(0.0) < 0
