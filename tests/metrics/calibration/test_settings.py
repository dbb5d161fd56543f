"""Windows longer than a model's context are refused before it is run."""

import pytest
from transformers import AutoConfig

from dropformer.metrics.calibration.settings import check_length, context_of
from dropformer.prune.errors import CalibrationError


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (AutoConfig.for_model("llama", max_position_embeddings=64), 64),
        (AutoConfig.for_model("gpt2", n_positions=32), 32),
        ({"n_positions": 16}, 16),
        ({"text_config": {"max_position_embeddings": 8}, "max_position_embeddings": 4}, 8),
        ({"hidden_size": 4}, None),
        (AutoConfig.for_model("bloom"), None),
    ],
)
def test_the_context_is_read_from_any_config(config, context):
    assert context_of(config) == context


def test_longer_windows_are_refused_and_windows_of_its_size_are_not():
    config = {"max_position_embeddings": 8}
    check_length(config, 8, "m")
    with pytest.raises(CalibrationError, match="windows of 9 tokens are longer than the context of m, 8"):
        check_length(config, 9, "m")
