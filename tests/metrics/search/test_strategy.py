"""Named qualities and the options that change them."""

import pytest

from dropformer.metrics.repair.distill import Distilling
from dropformer.metrics.repair.lora import Healing
from dropformer.metrics.repair.registry import REPAIRS, Training
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


def test_settings_of_training_are_for_repairs_that_take_them():
    assert quality("healed", training=Training(epochs=4, rank=8)).training == Training(4, 8)
    assert quality(repair="distill", training=Training(epochs=4)).training.epochs == 4
    with pytest.raises(PlanError, match="--rank is for a repair that trains; add --repair lora"):
        quality(repair="distill", training=Training(rank=8))
    with pytest.raises(PlanError, match="--epochs is for a repair that trains; add --repair distill or lora"):
        quality("best", training=Training(epochs=1))


def test_a_bar_expects_the_passes_of_the_epochs():
    assert REPAIRS["lora"].passes_of(Training()) == REPAIRS["lora"].passes_of(Training(epochs=2)) == 5
    assert REPAIRS["lora"].passes_of(Training(epochs=4)) == 9
    assert REPAIRS["refit"].passes_of(Training(epochs=4)) == REPAIRS["refit"].passes
    assert (REPAIRS["lora"].epochs, REPAIRS["distill"].epochs) == (Healing().epochs, Distilling().passes(999))
