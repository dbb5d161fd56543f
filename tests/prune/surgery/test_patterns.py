"""Pattern fields agree with layer_types after blocks are renumbered, or a note names the engines that are right."""

import pytest

from dropformer.prune.surgery.patterns import settled_patterns

NAMES = {"S": "sliding_attention", "F": "full_attention"}


@pytest.mark.parametrize(
    "field, value, kinds, after",
    [
        ("sliding_window_pattern", 3, "SSFSSF", 3),
        ("sliding_window_pattern", 3, "SFSF", 2),
        ("sliding_window_pattern", 3, "SFSSF", None),
        ("full_attention_interval", 4, "SSFSSF", 3),
        ("global_attn_every_n_layers", 3, "FSFS", 2),
        ("global_attn_every_n_layers", 3, "SSFSS", None),
        ("max_window_layers", 4, "FFFS", 3),
        ("max_window_layers", 28, "FSFS", None),
    ],
)
def test_a_value_that_gives_the_list_is_written_and_else_a_note(field, value, kinds, after):
    config = {"text_config": {field: value, "layer_types": [NAMES[kind] for kind in kinds]}}
    new, notes = settled_patterns(config)
    assert new["text_config"][field] == (after or value)
    assert [field in note for note in notes] == ([] if after else [True])


def test_a_model_of_one_kind_keeps_its_fields():
    config = {"max_window_layers": 28, "layer_types": ["full_attention"] * 3}
    assert settled_patterns(config) == (config, [])
