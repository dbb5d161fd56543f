"""Blocks between which the model acts on its stream by position keep their numbers, with text, images and audio."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

from dropformer import api
from dropformer.prune.artifact import ModelRef
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.positions import reads_numbers
from dropformer.prune.samples.modalities import modalities, sample_batches

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from families.tiny_models import tiny_model
from families.trial import silenced

# Families that add image features after text blocks, with these features in four blocks.
QWEN3 = {"vision_config": {"deepstack_visual_indexes": [0, 1, 2]}}
DEEPSTACK = {
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
    "qwen3_omni_moe_thinker": QWEN3,
    "granite4_vision": {
        "text_config": {"num_hidden_layers": 4},
        "vision_config": {"num_hidden_layers": 4, "patch_size": 4, "image_size": 32},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[1, 0], [2, 2]],
        "spatial_target_layers": [0, 1, 2, 2],
        "image_grid_pinpoints": [[32, 32]],
        "image_token_index": 127,
    },
    "granite_docling": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
}


def multimodal(family, **changes):
    return tiny_model(family, transformers.AutoModelForMultimodalLM, **changes)


def drop(model, spec):
    return api.drop(model, api.plan_unscored(ModelRef(name="m"), api.outline(model, spec), spec, (), None))


def check_silenced(model, pruned):
    """The pruned model equals the dense one with these layers silenced, on text and on every other modality."""
    architecture = discover(model)
    for inputs in sample_batches(model):
        with torch.no_grad(), silenced(model, architecture, pruned.dropformer.plan.layers):
            want = model(**inputs)[0]
        with torch.no_grad():
            torch.testing.assert_close(pruned(**inputs)[0], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", DEEPSTACK)
def test_image_features_added_between_blocks_stay_where_they_were(family):
    model = multimodal(family, **DEEPSTACK[family])
    pruned = drop(model, "block=1")
    check_silenced(model, pruned)
    assert "between the first" in pruned.dropformer.surgery.note


def test_blocks_after_the_last_such_place_are_taken_out():
    model = multimodal("qwen3_vl", vision_config={"deepstack_visual_indexes": [0]})
    pruned = drop(model, "block=2")
    check_silenced(model, pruned)
    assert pruned.dropformer.surgery.block_map.packed


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_omni_moe_thinker", "qwen3_asr", "llava", "idefics2"])
def test_every_modality_of_a_model_is_run(family):
    model = multimodal(family)
    assert len(sample_batches(model)) == 1 + len(modalities(model)) > 1


def test_a_convolution_after_the_first_block_keeps_it_in_place():
    model = tiny_model("deberta-v2", transformers.AutoModelForMaskedLM, conv_kernel_size=3, conv_act="gelu")
    pruned = drop(model, "block=0")
    check_silenced(model, pruned)
    assert len(pruned.deberta.encoder.layer) == 4


@pytest.mark.parametrize("family, reads", [("qwen3_vl", True), ("granite_docling", True), ("llava", False)])
def test_a_trunk_that_reads_the_number_of_a_block_is_known_by_its_source(family, reads):
    model = multimodal(family)
    assert reads_numbers(model, api.outline(model).stacks[0].path) is reads


class Add(torch.nn.Module):
    """A block of one MLP that may add something of its own."""

    def __init__(self, number):
        super().__init__()
        self.layer_idx, self.mlp = number, torch.nn.Linear(8, 8)

    def forward(self, x, also=None):
        return x + self.mlp(x if also is None else x + also)


class Trunk(torch.nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        self.layers = torch.nn.ModuleList(map(Add, range(blocks)))
        self.first = torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Sliced(Trunk):
    def forward(self, x):
        for layer in self.layers[:2]:
            x = layer(x)
        x = x.tanh()
        for layer in self.layers[2:]:
            x = layer(x)
        return x


class Counted(Trunk):
    def forward(self, x, images=None):
        count = 0
        for layer in self.layers:
            x = layer(x) if images is None else layer(x) + images[count]
            count += 1  # noqa: SIM113
        return x


class Zipped(Trunk):
    def forward(self, x, images=()):
        for layer, image in zip(self.layers, images, strict=True):
            x = layer(x) + image
        return x


class Told(Trunk):
    def forward(self, x, images=None):
        for layer in self.layers:
            x = layer(x) if images is None or layer.layer_idx > 1 else layer(x) + images
        return x


class Elsewhere(Trunk):
    def forward(self, x, images=None):
        return self.run(x, images)

    def run(self, x, images):
        for i, layer in enumerate(self.layers):
            x = layer(x) if images is None or i else layer(x) + images
        return x


class Numbered(Trunk):
    def forward(self, x):
        for _, layer in enumerate(self.layers[: self.depth]):
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "trunk, reads",
    [(Trunk, False), (Numbered, False), *((trunk, True) for trunk in (Sliced, Counted, Zipped, Told, Elsewhere))],
)
def test_a_trunk_that_does_not_just_run_its_blocks_in_turn_may_act_by_their_numbers(trunk, reads):
    assert reads_numbers(trunk(), "layers") is reads


class FirstOnly(Trunk):
    """Its first block is told more than the others, beside the stream."""

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x, None if i else self.first)
        return x


def test_blocks_that_are_alike_and_given_other_tensors_keep_their_numbers():
    stack = discover(FirstOnly(), {"x": torch.ones(1, 2, 8)}).stacks[0]
    assert stack.fixed == 1
    assert discover(Trunk(), {"x": torch.ones(1, 2, 8)}).stacks[0].fixed == 0


def test_a_forward_pass_that_takes_images_is_searched_whatever_the_config_says():
    model = tiny_model("layoutlmv3", transformers.AutoModelForTokenClassification)
    assert "image" in modalities(model)
