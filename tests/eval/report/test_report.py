"""The report of a drop gives each figure with its spread, and calls noise noise."""

import pytest
import torch

from dropformer.console import done, report_table
from dropformer.eval.cost.speed import Quartiles
from dropformer.eval.quality.perplexity import side_by_side
from dropformer.eval.report.report import Ratio, Report, Side, SpeedRef, card_lines
from dropformer.prune.artifact import ModelRef

SIZES = {"parameters": 100, "checkpoint_bytes": 400, "kv_bytes_per_token": 8}
SPEED = {"prompt": 8, "new": 2, "batch": 1, "device": "cpu", "dtype": "float32"}


def ratio(median, bound):
    return Ratio(**vars(Quartiles(median, median - 0.02, median + 0.03)), bound=bound)


def report(decode):
    return Report(
        model=ModelRef(name="tiny"), spec="attn:1", dropped={},
        dense=Side(**SIZES, perplexity=10.0, perplexity_stderr=0.5, decode_tokens_per_s=20.0),
        pruned=Side(**SIZES, perplexity=12.0, perplexity_stderr=0.6, decode_tokens_per_s=20.0 * decode),
        perplexity_ratio_stderr=0.012,
        speed=SpeedRef(**SPEED, decode_bound=1.1, prefill_bound=1.1, decode_ratio=ratio(decode, 1.1)),
    )  # fmt: skip


def cells(found):
    return [cell for column in report_table(found).columns for cell in column._cells]


def test_perplexity_and_speed_are_printed_with_their_spread():
    found = cells(report(1.05))
    assert {"10.00 ± 0.50", "12.00 ± 0.60", "1.200x ± 0.012", "1.050x [1.03, 1.08]"} <= set(found)
    assert (
        "Decode speed over dense on cpu (float32, batch 1), median and quartiles: 1.050x [1.03, 1.08]."
        in card_lines(report(1.05))
    )


def test_a_speed_beyond_what_the_work_allows_is_called_noise():
    assert "1.200x [1.18, 1.23] noise: more than 1.10x" in cells(report(1.2))
    assert not any("noise" in cell for cell in cells(report(1.05)))


def test_the_error_of_a_ratio_pairs_the_windows(tiny):
    model, ids = tiny.llama(), torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    assert side_by_side(model, model, ids).ratio_stderr == pytest.approx(0.0, abs=1e-9)
    other = tiny.llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(5)
    found = side_by_side(model, other, ids)
    each = torch.stack([(b - a).mean() for a, b in zip(*found.losses, strict=True)])
    ratio = float(each.mean().exp())
    assert found.pruned.value / found.dense.value == pytest.approx(ratio)
    assert found.ratio_stderr == pytest.approx(ratio * float(each.std()) / 2)
    assert side_by_side(model, other, ids[:1]).ratio_stderr is None


@pytest.mark.parametrize(("repairs", "said"), [([], "bytes are the source's"), (["refit"], "source's or its repair's")])
def test_repaired_weights_are_not_said_to_be_the_sources(repairs, said):
    record = {"format": "dropformer", "notes": [], "packed": False, "stock_windows": False, "repairs": repairs}
    assert done("out", record, ran=False).endswith(said)
