"""Named qualities and the options that change them."""

import pytest

from dropformer.metrics.search.strategy import QUALITIES, Strategy, quality
from dropformer.prune.errors import PlanError


def test_the_default_is_the_papers_method():
    assert quality() == QUALITIES["paper"] == Strategy(metric="similarity", select="one-shot", repair=())


def test_repairs_apply_in_the_order_that_makes_sense_whatever_was_typed():
    assert quality(repair="lora, refit-all, linear").repair == ("linear", "refit-all", "lora")


@pytest.mark.parametrize("wrong", [{"name": "worst"}, {"metric": "x"}, {"select": "x"}, {"repair": "linear,x"}])
def test_an_unknown_word_is_refused_with_the_known_ones(wrong):
    with pytest.raises(PlanError, match="expected one of"):
        quality(**wrong)
