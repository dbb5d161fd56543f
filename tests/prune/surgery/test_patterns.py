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
        ("global_attn_every_n_layers", 3, "SFSF", 2),
        ("global_attn_every_n_layers", 3, "SSFFS", None),
        ("sliding_window_pattern", 3, "SSS", 4),
        ("sliding_window_pattern", "LLG", "SFSF", "LG"),
        ("sliding_window_pattern", "LLLG", "SFSSF", "LGL"),
        ("window_pattern", 3, "FSFS", 2),
        ("layer_group_size", 4, "SFS", 2),
        ("strange_layer_period", 4, "SFS", None),
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


LLAMA4 = {"num_hidden_layers": 4}


@pytest.mark.parametrize(
    "config, after",
    [
        ({"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 0, 1, 1, 0]}, {"no_rope_layer_interval": 3}),
        ({"no_rope_layer_interval": 4, "no_rope_layers": [1, 0, 0, 1]}, None),
        ({"interleave_moe_layer_step": 3, "moe_layers": [1, 3], **LLAMA4}, {"interleave_moe_layer_step": 2}),
        ({"interleave_moe_layer_step": 2, "moe_layers": [0, 3], **LLAMA4}, None),
        ({"first_k_dense_replace": 3, "mlp_layer_types": ["dense", "sparse"]}, {"first_k_dense_replace": 1}),
        ({"first_k_dense_replace": 1, "mlp_layer_types": ["sparse", "dense"]}, None),
        (
            {"attn_layer_period": 6, "attn_layer_offset": 4, "layers_block_type": ["mamba", "hybrid", "mamba"]},
            {"attn_layer_period": 2, "attn_layer_offset": 1},
        ),
        (
            {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local", "local"]},
            {"attention_types": [[["global", "local", "local"], 1]]},
        ),
    ],
)
def test_other_lists_have_fields_of_their_own(config, after):
    new, notes = settled_patterns(config)
    assert new == {**config, **(after or {})}
    assert len(notes) == (after is None)


@pytest.mark.parametrize(
    "family, kinds, right",
    [("gpt_oss", "SFSF", True), ("gpt_oss", "SSF", False), ("gemma2", "FSF", False), ("qwen2", "FSF", True)],
)
def test_engines_that_count_kinds_by_block_number_are_named_where_they_would_be_wrong(family, kinds, right):
    config = {"text_config": {"model_type": family, "layer_types": [NAMES[kind] for kind in kinds]}}
    _, notes = settled_patterns(config)
    assert ["by its number" in note for note in notes] == ([] if right else [True])
