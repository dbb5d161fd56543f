"""Numbers of blocks in names, patterns, pairs and keys follow the blocks, or the blocks stay where they are."""

import json
import time

import pytest

from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import map_blocks
from dropformer.prune.errors import ArchitectureError, CheckpointError
from dropformer.prune.outline import BranchOutline, Outline, StackOutline
from dropformer.prune.surgery.block_numbers import BlockNumbers
from dropformer.prune.surgery.config import pruned_config
from dropformer.prune.surgery.side_files import followed_files


def outline(path="model.layers", blocks=12, name=""):
    made = {"attn": "self_attn", "mlp": "mlp"}
    branches = [
        BranchOutline(kind=kind, blocks=list(range(blocks)), modules={module: "zeros"}, parameters=1)
        for kind, module in made.items()
    ]
    return StackOutline(name=name, path=path, blocks=blocks, branches=branches)


def numbers(*dropped, stacks=None):
    found = Outline(stacks=stacks or [outline()], parameters=9)
    return BlockNumbers(found, map_blocks(found, [Layer.parse(d) for d in dropped]))


QUANTIZED = {
    "modules_to_not_convert": ["lm_head", "model.layers.3.mlp.up_proj", "model.layers.1.mlp.up_proj"],
    "ignore": ["re:.*layers\\.3\\..*", "re:.*mlp.gate$", "re:model.layers.\\d+.self_attn.*"],
    "exclude_modules": ["model.layers.3.self_attn*", "layers.11*"],
    "dynamic": {"-:.*\\.layers\\.3\\..*": {}, "+:.*\\.layers\\.1\\..*": {"bits": 8}},
    "config_groups": {"group_0": {"targets": ["Linear", "model.layers.4.mlp.down_proj"]}},
    "quantized_layers": {"model.layers.3.mlp.up_proj": {"quant_algo": "FP8"}, "model.layers.1.mlp.up_proj": {}},
}
FOLLOWED = {
    "modules_to_not_convert": ["lm_head", "model.layers.2.mlp.up_proj"],
    "ignore": ["re:.*layers\\.2\\..*", "re:.*mlp.gate$", "re:model.layers.\\d+.self_attn.*"],
    "exclude_modules": ["model.layers.2.self_attn*", "layers.10*"],
    "dynamic": {"-:.*\\.layers\\.2\\..*": {}},
    "config_groups": {"group_0": {"targets": ["Linear", "model.layers.3.mlp.down_proj"]}},
    "quantized_layers": {"model.layers.2.mlp.up_proj": {"quant_algo": "FP8"}},
}


@pytest.mark.parametrize("field", QUANTIZED)
def test_names_in_a_quantization_config_follow(field):
    assert numbers("block:1").follow(QUANTIZED[field]) == FOLLOWED[field]


def test_names_follow_the_half_of_a_block_that_they_are_of():
    found = numbers("mlp:1", "attn:2").follow(["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"])
    assert found == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


def test_names_of_other_stacks_stay():
    names = ["model.vision_tower.encoder.layers.3.mlp", "visual.blocks.3.attn", "mtp.layers.3.mlp"]
    assert numbers("block:1").follow(names) == names


def test_each_stack_has_numbers_of_its_own():
    stacks = [outline("model.encoder.layers", 6, "encoder"), outline("model.decoder.layers", 6, "decoder")]
    found = numbers("decoder.block:1", stacks=stacks)
    assert found.follow(["encoder.layers.3.mlp", "decoder.layers.3.mlp"]) == [
        "encoder.layers.3.mlp",
        "decoder.layers.2.mlp",
    ]
    with pytest.raises(ArchitectureError, match="which stack"):
        found.follow(["layers.3.mlp"])


def test_nothing_is_refused_where_no_block_moves():
    kept = {"ignore": ["re:.*layers\\.(3|4)\\..*", "model.layers.1*"]}
    assert numbers("attn:1").follow(kept) == kept


@pytest.mark.parametrize("value", [[[2, 0], [3, 1]], {"3": [1]}, {"nested": [[3, "a"]]}])
def test_unknown_pairs_and_keys_that_may_be_blocks_are_refused_by_name(value):
    with pytest.raises(ArchitectureError, match="strange"):
        pruned_config(
            {"num_hidden_layers": 12, "strange": value}, numbers("block:1").outline, numbers("block:1").block_map
        )


@pytest.mark.parametrize(
    "field", [{"id2label": {"0": "a", "1": "b"}}, {"strange": [[0, 1]]}, {"grid_pinpoints": [[1, 2]]}]
)
def test_what_names_no_block_that_moves_stays(field):
    found = numbers("block:2")
    assert pruned_config({"num_hidden_layers": 12, **field}, found.outline, found.block_map) == {
        "num_hidden_layers": 11,
        **field,
    }


@pytest.mark.parametrize(
    "field, value, after",
    [
        ("alignment_heads", [[2, 0], [1, 3], [3, 1]], [[1, 0], [2, 1]]),
        ("assistant_early_exit", 4, 3),
        ("dola_layers", [0, 2, 4], [0, 1, 3]),
        ("forced_decoder_ids", [[1, 2]], [[1, 2]]),
    ],
)
def test_generation_settings_follow(tmp_path, field, value, after):
    (tmp_path / "generation_config.json").write_text(json.dumps({field: value, "top_p": 0.5}))
    found = numbers("block:1")
    new = followed_files(tmp_path, found.outline, found.block_map).get("generation_config.json")
    assert json.loads(new)[field] == after if new else after == value


@pytest.mark.parametrize(
    "field, value",
    [
        ("alignment_heads", [[1], [], ["x", 2]]), ("alignment_heads", [1, 2]), ("alignment_heads", [["x", 2]]),
        ("dola_layers", ["x"]), ("dola_layers", [-1]), ("assistant_early_exit", -2), ("assistant_early_exit", True),
        ("assistant_early_exit", 2.5),
    ],
)  # fmt: skip
def test_generation_settings_of_another_form_leave_the_blocks_in_place(field, value):
    with pytest.raises(ArchitectureError, match=field):
        numbers("block:1").generation({field: value})
    assert numbers("attn:1").generation({field: value}) == {field: value}


def test_heads_of_a_dropped_cross_attention_are_left_out():
    cross = BranchOutline(kind="cross", blocks=list(range(4)), modules={"encoder_attn": "zeros"}, parameters=1)
    stack = outline("model.decoder.layers", 4).model_copy(update={"branches": [*outline(blocks=4).branches, cross]})
    found = Outline(stacks=[stack], parameters=9)
    followed = BlockNumbers(found, map_blocks(found, [Layer("cross", 2)])).generation(
        {"alignment_heads": [[2, 0], [3, 1]]}
    )
    assert followed == {"alignment_heads": [[3, 1]]}


def test_quantization_files_beside_the_config_follow(tmp_path):
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": QUANTIZED}))
    (tmp_path / "recipe.yaml").write_text("ignore: [lm_head, model.layers.3.mlp.up_proj]\n")
    found = numbers("block:1")
    new = followed_files(tmp_path, found.outline, found.block_map)
    assert json.loads(new["hf_quant_config.json"]) == {"quantization": FOLLOWED}
    assert "model.layers.2.mlp.up_proj" in new["recipe.yaml"]


def test_files_that_count_the_blocks_follow(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 12}))
    (tmp_path / "ignored.json").write_text(json.dumps(["model.layers.3.mlp", "model.layers.1.mlp"]))
    found = numbers("block:1")
    new = followed_files(tmp_path, found.outline, found.block_map)
    assert json.loads(new["params.json"]) == {"dim": 64, "n_layers": 11}
    assert json.loads(new["ignored.json"]) == ["model.layers.2.mlp"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("kv_cache_scales.json", '{"kv_cache": {"scaling_factor": {"0": {"0": 0.1, "1": 0.2}}}}'),
        ("2_WeightedLayerPooling/config.json", '{"word_embedding_dimension": 32, "num_hidden_layers": 12}'),
        ("exits.json", '{"exit_layers": [2, 5]}'),
        ("bits.json", '{"layer_bits": [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 8]}'),
        ("skip.toml", 'skip = ["model.layers.3.mlp"]'),
        ("layer_3.npy", "x"),
        ("steering/layers/3.npz", "x"),
        ("imatrix.dat", "\x00\x01blk.3.ffn_down.weight\x00"),
        ("params.json", '{"n_layers": 40}'),
        ("draft.json", '{"eagle_layer_ids": [1, 3, 5]}'),
        ("generation_config.json", '{"exit_layer": 4, "eos_token_id": 2}'),
    ],
)
def test_a_file_that_names_blocks_in_an_unknown_way_leaves_them_in_place(tmp_path, name, content):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text(content)
    found = numbers("block:1")
    with pytest.raises(ArchitectureError, match=name):
        followed_files(tmp_path, found.outline, found.block_map)
    kept = numbers("attn:1")
    assert followed_files(tmp_path, kept.outline, kept.block_map) == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"skip_layers": [3, 4]}, {"first_layers": 3}, {"groups": {"3": {"bits": 4}}}, {"layer_bits": [4] * 12},
        {"x": {"y": [{"layers": [2, 5]}]}}, {"layers": {"names": "layer_3"}},
    ],
)  # fmt: skip
def test_settings_of_a_quantizer_that_may_name_blocks_leave_them_in_place(fields):
    found = numbers("block:1")
    with pytest.raises(ArchitectureError, match="quantization_config"):
        pruned_config({"num_hidden_layers": 12, "quantization_config": fields}, found.outline, found.block_map)


def test_settings_of_a_quantizer_that_name_no_blocks_stay():
    fields = {"quant_method": "fp8", "weight_block_size": [128, 128], "group_size": 8, "version": "0.3.1", "bits": 4}
    fields |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}, "sym": True}
    found, config = numbers("block:1"), {"num_hidden_layers": 12, "quantization_config": fields}
    assert pruned_config(config, found.outline, found.block_map)["quantization_config"] == fields


PATTERNS = {
    "re:.*layers\\.(3|4)\\..*": "re:.*layers\\.(?:2|3)\\..*",
    "re:.*layers\\.(?:0|1)\\.mlp": "re:.*layers\\.(?:0)\\.mlp",
    "re:.*layers.[3-5].mlp": "re:.*layers.(?:2|3|4).mlp",
    "re:.*layers\\.\\d\\.mlp": "re:.*layers\\.(?:0|1|2|3|4|5|6|7|8)\\.mlp",  # of one digit: block 10 is now 9
    "re:.*layers\\.1\\d\\.mlp": "re:.*layers\\.(?:9|10)\\.mlp",
    "re:.*layers\\.(\\d|1[01])\\.mlp": "re:.*layers\\.(\\d|1[01])\\.mlp",
    "re:.*layers\\.\\d+\\.mlp": "re:.*layers\\.\\d+\\.mlp",
    "model.layers.*.mlp": "model.layers.*.mlp",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_names_the_same_blocks_afterwards(pattern):
    assert numbers("block:1").follow([pattern]) == [PATTERNS[pattern]]


UNCLEAR = [
    "model.layers.1*",
    "model.layers.?.mlp",
    "model.layers.[3-5].mlp",
    "model.layers.3-5",
    "strange.layers.3.mlp",
]
UNCLEAR += [
    "re:.*layers\\.1.*",
    "re:.*layers\\.(?!3\\.).*",
    "re:.*layers\\.3|lm_head",
    "layers_3",
    "layer_3.mlp",
    "blk.3.ffn",
]
UNCLEAR += [
    "model.layers[3].mlp",
    "model/layers/3/mlp",
    "Layers.3.mlp",
    "re:.*\\.(3|4)\\.mlp",
    "*.3.*",
    "3.mlp.up",
    "layers.3..5",
]
UNCLEAR += ["re:model\\.\\w+\\.3\\.mlp", "re:.*layers\\.(3\\.mlp", "model.layers.0,model.layers.3"]
UNCLEAR += ["re:.*layers[.]3[.].*", "re:.*(layers)\\.(3|4)\\..*", "-:.*\\.layers[.]3\\.", "*layers[.]3*"]  # other dots
UNCLEAR += ["re:.*layers.1.*", "model.layers.1.*", "re:.*layers.1.", "re:.*layers\\.[^1].*"]  # 10 and 11 too
UNCLEAR += ["model.layers.1"]  # and so by substring


@pytest.mark.parametrize("pattern", UNCLEAR)
def test_a_pattern_that_cannot_follow_is_refused_by_name(pattern):
    with pytest.raises(ArchitectureError, match="ignore"):
        numbers("block:1").follow({"ignore": [pattern]})
    assert numbers("attn:1").follow({"ignore": [pattern]}) == {"ignore": [pattern]}


def test_settings_with_a_pattern_for_every_module_take_seconds():
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    patterns = [f"+:.*\\.layers\\.{i}\\..*{kind}.*" for i in range(80) for kind in kinds]
    start = time.process_time()
    assert len(numbers("block:1", stacks=[outline(blocks=80)]).follow(patterns)) == 79 * 7
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_scales": {str(i): 1.5 for i in range(12)}}, {"exit_config": {"exits": [1, 3]}},
        {"nested": {"inner": {"exits": [1, 3]}}}, {"layers_to_skip": "3"}, {"drop_layers": "1,3-5"},
    ],
)  # fmt: skip
def test_fields_of_a_config_that_may_name_blocks_leave_them_in_place(fields):
    found = numbers("block:1")
    with pytest.raises(ArchitectureError, match=next(iter(fields))):
        pruned_config({"num_hidden_layers": 12, **fields}, found.outline, found.block_map)


def aliases() -> str:
    """Nine lines of YAML that stand for 10^9 values."""
    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    return "a: &a [" + "x, " * 9 + "x]\n" + "".join(f"{y}: &{y} [{f'*{x}, ' * 9}*{x}]\n" for x, y in pairs)


@pytest.mark.parametrize(
    "text", [aliases(), "a: &a [*a]", "[" * 100 + "]" * 100], ids=["aliases of aliases", "a circle", "deep"]
)
def test_a_file_that_would_take_forever_to_follow_is_refused_by_name(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    found = numbers("block:1")
    with pytest.raises(CheckpointError, match=r"recipe\.yaml: more than"):
        followed_files(tmp_path, found.outline, found.block_map)
