"""Windows alone are written as a stock model where its class computes the same."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, MinistralForCausalLM

from dropformer import api
from dropformer.prune.formats.export import reference
from dropformer.prune.formats.verify import verify
from dropformer.prune.loading.load import load
from dropformer.prune.surgery.stock_windows import FULL, SLIDING

WIDTH, LENGTH = 5, 24
EXACT = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "ministral": {"sliding_window": WIDTH, "layer_types": [FULL, SLIDING, FULL, FULL], "head_dim": 8},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "gemma2": {"sliding_window": WIDTH, "head_dim": 8},
}


def written(model, folder, spec):
    model.save_pretrained(folder / "dense")
    source = folder / "dense"
    opened = api.LoadedModel(load(source), None, source, reference("tiny", source), None)
    plan = api.plan_unscored(opened.ref, api.outline(opened.model), spec, (), None)
    pruned = api.drop(opened, plan)
    return pruned, api.save(pruned, folder / "out")


@pytest.mark.parametrize("family", EXACT)
def test_a_stock_class_gives_the_windowed_models_logits_beyond_the_window(tiny, tmp_path, family):
    model = tiny(family, initializer_range=0.3, **EXACT[family])
    free = [1, 3] if family == "gemma2" else [0, 2]
    spec = f"window={','.join(map(str, free))}@{WIDTH}"
    pruned, exported = written(model, tmp_path, spec)
    out = tmp_path / "out"
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        whole, mine, theirs = (each(ids).logits for each in (model, pruned, stock))
        cached = stock(ids[:, -1:], past_key_values=stock(ids[:, :-1], use_cache=True).past_key_values).logits
    assert "Dropformer" not in type(stock).__name__ and not list(out.glob("*.py"))
    torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cached[:, 0], mine[:, -1], atol=1e-5, rtol=1e-5)
    assert (mine - whole)[:, WIDTH:].abs().max() > 1e-3
    assert exported.record["stock_windows"] and exported.max_difference < 1e-5
    assert "layer_types" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "spec", "changes"),
    [
        ("llama", "window=0,2@5+1", {}),  # sinks
        ("llama", "window=0@5,window=2@6", {}),  # two widths
        ("llama", "window=0@5", {"attention_bias": True}),  # Ministral has none
        ("llama", "attn=1,window=0@5", {}),  # a layer is missing
        ("gemma2", "window=1@6", {"sliding_window": 5, "head_dim": 8}),  # its own windows have another width
        ("phi3", "window=0@5", {"sliding_window": None}),  # no windows by layer
    ],
)
def test_what_no_stock_class_computes_is_written_as_our_own_type(tiny, tmp_path, family, spec, changes):
    _, exported = written(tiny(family, **changes), tmp_path, spec)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "dropformer"
    assert not exported.record["stock_windows"]


def test_no_stock_model_with_windows_says_that_all_of_its_layers_are_full(tiny, tmp_path):
    """vLLM would take the width for every layer where `max_window_layers` is the number of layers."""
    written(tiny("qwen3", max_window_layers=4), tmp_path, "window=1,2@5")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["model_type"] == "qwen3" and fields["max_window_layers"] == 1


def test_dropped_blocks_and_windows_make_a_shorter_stock_model(tiny, tmp_path):
    pruned, _ = written(tiny("llama", initializer_range=0.3), tmp_path, f"block=1,window=2@{WIDTH}")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(LENGTH)[None] + 3
    with torch.inference_mode():
        torch.testing.assert_close(stock(ids).logits, pruned(ids).logits, atol=1e-5, rtol=1e-5)
    assert isinstance(stock, MinistralForCausalLM) and len(stock.model.layers) == 3


def test_a_window_that_is_written_one_token_too_wide_is_found_by_the_check_beyond_it(tiny, tmp_path):
    from dropformer.prune.errors import VerificationError

    pruned, _ = written(tiny("llama", initializer_range=0.3), tmp_path, "window=0,1,2,3@40")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(fields | {"sliding_window": 41}))
    with pytest.raises(VerificationError, match="other logits"):
        verify(tmp_path / "out", pruned, api.drop_record(pruned).surgery)
