"""Ridge regression from moments: exact where it can be, and validated on text that it was not fitted on."""

import pytest
import torch

from dropformer.metrics.repair.ridge import ChannelSums, MomentSums, error, fit, group_of, solve, token_weights


def test_the_solution_without_penalty_is_least_squares():
    draw = torch.Generator().manual_seed(0)
    z, r = torch.randn(50, 5, generator=draw), torch.randn(50, 3, generator=draw)
    sums = MomentSums()
    sums.add(z, [r], torch.ones(50))
    zz, zr, rr = sums.mean()
    w = solve(zz, zr[0], 1e-12, exact=True)
    torch.testing.assert_close(w.float(), torch.linalg.lstsq(z, r).solution, rtol=1e-3, atol=1e-4)
    left = float((r - z @ w.float()).square().sum() / r.square().sum())
    assert error(zz, zr[0], float(rr), w) == pytest.approx(left, abs=1e-5)


def test_sums_do_not_depend_on_how_the_windows_are_split():
    draw = torch.Generator().manual_seed(0)
    z, r, w = (
        torch.randn(6, 7, 5, generator=draw),
        torch.randn(6, 7, 3, generator=draw),
        torch.rand(6, 7, generator=draw),
    )
    one, many = MomentSums(), MomentSums()
    one.add(z, [r], w)
    for i in range(6):
        many.add(z[i], [r[i]], w[i])
    for whole, parts in zip(one.sums, many.sums, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)


def test_a_fit_that_does_not_carry_over_to_another_kind_of_text_is_no_change():
    draw = torch.Generator().manual_seed(0)
    groups = {}
    for kind, sign in enumerate((1, -1)):
        z = torch.randn(100, 4, generator=draw)
        groups[kind] = MomentSums()
        groups[kind].add(z, [sign * z], torch.ones(100))
    (found,) = fit(groups)
    assert not found.change.any() and found.left_over == 1 and not found.helps


def test_windows_that_judge_are_of_every_kind_and_choose_the_penalty():
    """More text of the same kind: the less noise an input carries over, the smaller the penalty."""
    assert [group_of(1, n) for n in range(5)] == [1, 1, 1, None, 1]
    draw = torch.Generator().manual_seed(0)
    found = {}
    for noise in (0.01, 3.0):
        groups = {0: MomentSums(), None: MomentSums()}
        for sums in groups.values():
            z = torch.randn(40, 20, generator=draw)
            sums.add(z, [z[:, :1] + noise * torch.randn(40, 1, generator=draw)], torch.ones(40))
        (found[noise],) = fit(groups)
    assert found[0.01].penalty < found[3.0].penalty and found[0.01].left_over < 0.1 < found[3.0].left_over


def test_sinks_weigh_their_share_and_no_more():
    stream = torch.ones(2, 50, 8)
    stream[:, 0] *= 1000
    weights = token_weights(stream, share=0.1)
    assert float(weights.sum()) == pytest.approx(100, rel=1e-4)
    assert float(weights[:, 0].sum()) == pytest.approx(10, rel=1e-4)


@pytest.mark.parametrize("before", [0, 30])
def test_padding_on_either_side_changes_no_weight_and_has_none(before):
    draw = torch.Generator().manual_seed(0)
    stream = torch.randn(2, 20, 8, generator=draw)
    stream[:, 7] *= 100  # a sink
    counted = torch.rand(2, 20, generator=draw) > 0.3
    padded, inside = torch.full((2, 60, 8), 50.0), torch.zeros(2, 60, dtype=torch.bool)
    counts = inside.clone()
    place = slice(before, before + 20)
    padded[:, place], inside[:, place], counts[:, place] = stream, True, counted

    weights = token_weights(padded, counts, inside)

    assert torch.allclose(weights[:, place], token_weights(stream, counted))
    assert weights[~inside].abs().max() == 0


def test_a_huge_input_does_not_make_the_penalty_of_the_others_huge():
    draw = torch.Generator().manual_seed(0)
    z, huge = torch.randn(200, 3, generator=draw), torch.randn(200, 1, generator=draw) * 1e4
    r = z @ torch.randn(3, 2, generator=draw)
    weights = []
    for inputs in (z, torch.cat([z, huge], -1)):
        sums = MomentSums()
        sums.add(inputs, [r], torch.ones(200))
        zz, zr, _ = sums.mean()
        weights.append(solve(zz, zr[0], 0.1)[:3])
    torch.testing.assert_close(weights[0], weights[1], rtol=0.05, atol=0.05)


def test_several_targets_add_up():
    draw = torch.Generator().manual_seed(0)
    z, one, two = (torch.randn(30, k, generator=draw) for k in (4, 2, 2))
    parts, whole = MomentSums(), MomentSums()
    parts.add(z, [one, two], torch.ones(30))
    whole.add(z, [one + two], torch.ones(30))
    both, alone = fit({0: parts}, [(0, 1), (0,)])
    (expected,) = fit({0: whole})
    torch.testing.assert_close(both.change, expected.change, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone.change, expected.change)


def test_a_wide_products_panels_are_the_whole_product():
    z = torch.randn(40, 700, generator=torch.Generator().manual_seed(0))
    sums = MomentSums()
    sums.add(z, [z[:, :2]], torch.ones(40))
    torch.testing.assert_close(sums.sums[0], z.T @ z, rtol=1e-4, atol=1e-4)


def test_a_weight_for_each_channel_is_that_channels_least_squares():
    draw = torch.Generator().manual_seed(0)
    z, scale = torch.randn(200, 5, generator=draw), torch.randn(5, generator=draw)
    sums = ChannelSums()
    sums.add(z[..., None], [z * scale], torch.ones(200))
    (found,) = fit({0: sums}, penalties=[1e-6])
    torch.testing.assert_close(found.change[:, 0, 0], scale, rtol=1e-4, atol=1e-4)


def test_float32_sums_and_factors_give_what_float64_gives():
    """Correlated inputs of very different sizes, as behind an attention sink; the least penalty."""
    draw = torch.Generator().manual_seed(0)
    few, mix, noise = (torch.randn(*shape, generator=draw) for shape in ((2000, 8), (8, 64), (2000, 64)))
    z = few @ mix + 0.1 * noise
    z[:, 0] *= 1e3
    r = z @ torch.randn(64, 3, generator=draw) + torch.randn(2000, 3, generator=draw)
    sums = MomentSums()
    sums.add(z, [r], torch.ones(2000))
    zz, zr, _ = sums.mean()
    exact = solve(z.double().T @ z.double() / 2000, z.double().T @ r.double() / 2000, 1e-3, exact=True)
    for found in (solve(zz, zr[0], 1e-3), solve(zz, zr[0], 1e-3, exact=True)):
        assert float((z @ (found.float() - exact.float())).norm() / (z @ exact.float()).norm()) < 1e-3
