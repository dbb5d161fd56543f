"""A config object from the content of config.json."""

import pytest

from dropformer.prune.errors import CheckpointError
from dropformer.prune.loading.described import config_from


@pytest.mark.parametrize(
    "fields", [{"model_type": "unheard"}, {"model_type": "dropformer", "base_model_type": "unheard"}]
)
def test_a_type_that_only_a_checkpoints_code_knows_is_refused_in_a_line(fields):
    with pytest.raises(CheckpointError, match="model_type unheard is known to a checkpoint's own code") as error:
        config_from(fields)
    assert "\n" not in str(error.value)


def test_a_known_type_gives_its_config():
    assert config_from({"model_type": "llama", "num_hidden_layers": 3}).num_hidden_layers == 3
