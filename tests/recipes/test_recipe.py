from importlib.resources import files

import pytest

from dropformer.prune.errors import ModelError, PlanError
from dropformer.recipes.recipe import parse_recipe, recipe, recipe_of, recipes

MINIMAL = "model: org/name\nlicence: mit\ncalibration: {name: c4, windows: 2, length: 8}\n"


def test_every_recipe_file_is_short_and_valid():
    entries = [
        entry for entry in files("dropformer.recipes").joinpath("models").iterdir() if entry.name.endswith(".yaml")
    ]
    assert {entry.name.removesuffix(".yaml") for entry in entries} == set(recipes())
    assert all(len(entry.read_text().splitlines()) <= 20 for entry in entries)


def test_the_names_people_type_are_there():
    assert set(recipes()) >= {
        "smollm2-135m", "llama-2-7b", "llama-2-13b", "llama-2-70b", "mistral-7b", "llama-3-8b",
        "llama-3-70b", "qwen2.5-7b",
    }  # fmt: skip


def test_published_lists_are_cut_from_their_most_redundant_end():
    assert recipe("llama-2-13b").published("attn", 4) == [33, 32, 35, 30]
    assert recipe("mistral-7b").published("block", 8) == [26, 25, 24, 27, 23, 22, 28, 21]


@pytest.mark.parametrize("count", [9, 0, -1])
def test_asking_for_more_layers_than_published_says_how_many_there_are(count):
    with pytest.raises(PlanError, match="it has 8"):
        recipe("mistral-7b").published("mlp", count)


def test_asking_for_a_list_nobody_published_says_which_there_are():
    with pytest.raises(PlanError, match="none for any kind"):
        recipe("qwen2.5-7b").published("attn", 1)
    with pytest.raises(PlanError, match="attn, mlp, block"):
        recipe("mistral-7b").published("joint", 1)


def test_published_indices_are_blocks_that_the_model_has():
    for name, blocks in {"llama-2-13b": 40, "mistral-7b": 32}.items():
        assert all(index < blocks for indices in recipe(name).lists.values() for index in indices)


def test_published_results_come_with_their_dense_baseline_and_source():
    for found in recipes().values():
        assert bool(found.results or found.lists) == bool(found.source)
        if found.results:
            assert found.results[0].drop == "none" and found.results[0].speedup == 1.0


def test_the_papers_calibration_is_the_default_of_the_papers_models():
    for name in ("llama-2-7b", "llama-2-13b", "llama-2-70b", "mistral-7b"):
        text = recipe(name).calibration
        assert (text.name, text.windows, text.length) == ("c4", 256, 2048)
    assert recipe("smollm2-135m").calibration.name == "builtin"


def test_a_misspelt_name_is_answered_with_the_closest_ones():
    with pytest.raises(ModelError, match="did you mean mistral-7b"):
        recipe("mistal-7b")
    with pytest.raises(ModelError, match="recipes: llama-2-13b"):
        recipe("zzz")


def test_a_recipe_is_found_by_its_hub_id_in_any_case():
    assert recipe_of("Mistralai/mistral-7B-v0.1") == recipe("mistral-7b")
    assert recipe_of("org/unknown") is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("colour: red\n", "colour"),
        ("lists: {attn: [1, 1]}\n", "twice"),
        ("lists: {attn: [-1]}\n", "attn.0"),
        ("lists: {heads: [1]}\n", "heads"),
        ("results: [{drop: none, mmlu: 155, mean: 60, speedup: 1}]\n", "mmlu"),
        ("wheel: {project: ../x, version: 1.0, sha256: ab, nbytes: 1, member: x.gguf}\n", "wheel"),
        (": [\n", "not YAML"),
    ],
)
def test_a_malformed_recipe_is_refused_in_one_line(change, complaint):
    with pytest.raises(ModelError, match=complaint) as caught:
        parse_recipe("mine", MINIMAL + change)
    assert "\n" not in str(caught.value)


def test_a_recipe_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        recipes()["mine"] = recipe("mistral-7b")  # type: ignore[index]
    assert parse_recipe("mine", MINIMAL).lists == {}
