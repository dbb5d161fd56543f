"""transformers' own heterogeneous layers (`per_layer_config` with `skip`): the written vocabulary is the release's.

transformers 5.23 parses it and builds every layer all the same (its PR 45332 is to build them).  The tests of native
loading switch themselves on in a release that leaves skipped layers out.
"""

import json
import shutil

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

import dropformer

OURS = ("auto_map", "model_file", "base_model_type", "dropformer_modules", "dropformer_no_cache")
SPEC = "attn=0,2,mlp=1"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
SIZES = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 2}


def builds_skipped_layers() -> bool:
    """Does the installed release build a layer that its config skips?"""
    skip = {"1": {"skip": ["attention"]}}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, per_layer_config=skip))
    return any("layers.1.self_attn" in name for name, _ in model.named_parameters())


@pytest.fixture
def written(lively, pruned_in_memory, tmp_path):
    """A pruned model and its folder, and the fields of its config.json as the base family's own."""

    def make(family):
        pruned = pruned_in_memory(lively(tmp_path / "dense", family), SPEC)
        dropformer.save(pruned, tmp_path / "out")
        fields = json.loads((tmp_path / "out" / "config.json").read_text())
        base = {key: value for key, value in fields.items() if key not in OURS}
        architecture = fields["architectures"][0].removeprefix("Dropformer")
        return (
            pruned,
            tmp_path / "out",
            base | {"model_type": fields["base_model_type"], "architectures": [architecture]},
        )

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_installed_release_reads_the_written_entries_as_it_writes_its_own(written, family):
    _, _, fields = written(family)
    config = CONFIG_MAPPING[family].from_dict(fields)
    skips = [list(getattr(layer, "skip", ())) for layer in config.per_layer_config]
    assert skips == [["attention"], ["mlp"], ["attention"], []]
    kept = {str(i): layer for i, layer in config.to_dict()["per_layer_config"].items()}
    assert kept == fields["per_layer_config"]


@pytest.mark.skipif(not builds_skipped_layers(), reason="this release of transformers leaves skipped layers out")
def test_a_release_that_builds_skipped_layers_is_never_given_the_base_type(written):
    """It would fill them with random numbers: only the checkpoint's own type stops it."""
    _, folder, fields = written("llama")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "dropformer"
    (folder / "config.json").write_text(json.dumps(fields))
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert any("layers.0.self_attn" in name for name in info["missing_keys"])


@pytest.mark.skipif(builds_skipped_layers(), reason="this release of transformers builds layers that the config skips")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_release_that_leaves_skipped_layers_out_loads_the_weights_natively(written, tmp_path, ids, family):
    pruned, folder, fields = written(family)
    native = shutil.copytree(folder, tmp_path / "native")
    (native / "config.json").write_text(json.dumps(fields))
    model, info = AutoModelForCausalLM.from_pretrained(native, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(model.eval()(ids).logits, pruned(ids).logits)
