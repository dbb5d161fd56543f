"""The mathematics of a comparison and its artifact, without any model."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from dropformer.eval.compare.alignment import StackOrigin, aligned
from dropformer.eval.compare.comparison import (
    Comparison,
    Entry,
    chosen_layers,
    compare_scores,
    jaccard,
    jaccard_by_chance,
    spearman,
)
from dropformer.metrics.analysis.scores import LayerScore, Scores
from dropformer.metrics.calibration.settings import CalibrationRef
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.outline import BranchOutline, Outline, StackOutline

CALIBRATION = CalibrationRef(name="t", samples=1, length=8, seed=0, packed=True, skip_first=0, hash="0")


def outline(blocks: int) -> Outline:
    branches = [
        BranchOutline(kind=kind, blocks=list(range(blocks)), modules={}, parameters=1) for kind in ("attn", "mlp")
    ]
    return Outline(stacks=[StackOutline(path="layers", blocks=blocks, branches=branches)], parameters=10)


def scores(attention: list[float], name: str = "m") -> Scores:
    """MLP layers and blocks get the same values as attention."""
    layers = [
        LayerScore(layer=f"{kind}:{i}", similarity=value)
        for i, value in enumerate(attention)
        for kind in ("block", "attn", "mlp")
    ]
    return Scores(model=ModelRef(name=name, fingerprint=name), calibration=CALIBRATION, windows=1, tokens=8,
                  layers=layers, outline=outline(len(attention)))  # fmt: skip


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no bug
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=12))
def test_spearman_is_scipys_ties_included(pairs: list[tuple[int, int]]) -> None:
    x, y = ([float(v) for v in column] for column in zip(*pairs, strict=True))
    found = spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(x, y).statistic)


def test_spearman_takes_only_the_layers_that_both_have() -> None:
    assert spearman([1, None, 2, 3, 9], [1, 7, 2, 3, None]) == pytest.approx(1)
    assert spearman([1, None, 2], [1, 2, 3]) is None


@pytest.mark.parametrize(("chosen", "total"), [(1, 4), (2, 5), (3, 4), (4, 4)])
def test_overlap_by_chance_is_the_mean_over_all_pairs_of_choices(chosen: int, total: int) -> None:
    sets = [frozenset(Layer("attn", i) for i in choice) for choice in combinations(range(total), chosen)]
    assert jaccard_by_chance(chosen, total) == pytest.approx(np.mean([jaccard(a, b) for a in sets for b in sets]))


def test_a_joint_spec_chooses_out_of_both_kinds() -> None:
    found = compare_scores([Entry("a", 1, scores([0.1, 0.2, 0.3])), Entry("b", 2, scores([0.3, 0.2, 0.1]))], "joint:2")
    assert found.checkpoints[0].chosen == ["attn:2", "mlp:2"]
    assert found.overlap_by_chance == pytest.approx(jaccard_by_chance(2, 6))
    assert found.overlap == [[1.0, 0.0], [0.0, 1.0]]


def test_a_combined_spec_has_no_overlap_by_chance() -> None:
    found = compare_scores([Entry("a", 1, scores([0.1, 0.2])), Entry("b", 2, scores([0.1, 0.2], "n"))], "attn:1,mlp:1")
    assert found.overlap_by_chance is None
    assert found.known_from.index == 0


def test_protected_blocks_are_not_chosen() -> None:
    assert chosen_layers(scores([0.1, 0.2, 0.3]), "attn:1", (-1,)) == [Layer("attn", 1)]


def test_the_artifact_reads_back_as_it_was_written(tmp_path: Path) -> None:
    found = compare_scores(
        [Entry("a", None, scores([0.1, 0.2, 0.4])), Entry("b", None, scores([0.3, 0.2, 0.1]))], "attn:1"
    )
    again = Comparison.read(found.write(tmp_path / "compare.json"))
    assert again == found
    assert again.steps is None and again.spearman_to_last("attn") == [pytest.approx(-1), pytest.approx(1)]


def test_layers_of_a_packed_model_go_back_to_where_they_came_from() -> None:
    """attn=1,mlp=0 of four blocks: block 0 has the attention of 0 and the MLP of 1."""
    origin = {"": StackOrigin(((0, 1), (2, 2), (3, 3)), frozenset({("attn", 1), ("mlp", 0)}))}
    found = aligned(scores([0.1, 0.2, 0.3]), origin)
    assert {str(layer): value for layer, value in found.similarity().items()} == {
        "attn:0": 0.1, "mlp:1": 0.1, "block:2": 0.2, "attn:2": 0.2, "mlp:2": 0.2, "block:3": 0.3, "attn:3": 0.3,
        "mlp:3": 0.3,
    }  # fmt: skip
    assert found.outline.layers("attn") == [Layer("attn", i) for i in (0, 2, 3)]
    assert found.outline.stack("").blocks == 4


def test_skipped_layers_of_a_model_with_holes_are_gone_whatever_they_scored() -> None:
    origin = {"": StackOrigin(((0, 0), (1, 1)), frozenset({("attn", 1)}))}
    found = aligned(scores([0.1, 1.0]), origin).similarity()
    assert Layer("attn", 1) not in found
    assert Layer("block", 1) in found and Layer("mlp", 1) in found  # what is left of the block
