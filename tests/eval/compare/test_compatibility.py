"""Which checkpoints can be compared."""

import pytest

from dropformer.eval.compare.alignment import StackOrigin
from dropformer.eval.compare.compatibility import Comparable
from dropformer.prune.errors import ModelError

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4}


def test_a_llama_that_became_a_ministral_for_its_windows_is_compared_with_the_dense_one():
    found = Comparable()
    found.config("dense", LLAMA, None)
    found.config(
        "windows", LLAMA | {"model_type": "ministral"}, {"": StackOrigin(tuple((i, i) for i in range(4)), frozenset())}
    )


def test_a_ministral_of_its_own_is_refused_beside_a_llama():
    found = Comparable()
    found.config("dense", LLAMA, None)
    with pytest.raises(ModelError, match="its family is ministral, not llama"):
        found.config("other", LLAMA | {"model_type": "ministral"}, None)


@pytest.mark.parametrize("other", [{"model_type": "qwen2"}, {"model_type": "ministral", "hidden_size": 32}])
def test_another_family_or_width_is_refused_by_name(other):
    found = Comparable()
    found.config("dense", LLAMA, None)
    with pytest.raises(ModelError, match="cannot be compared with dense"):
        found.config("other", LLAMA | other, None)
