"""llama.cpp computes what torch does with pruned files of the architectures that transformers reads.

Without flash attention all is in 32 bits but GELU, which llama.cpp looks up in a table of 16 bits.
"""

import copy

import pytest
import torch
from gguf_families import family_gguf, tiny_model
from llamacpp_run import IDS, NEEDS_LLAMACPP, error, llamacpp

from dropformer.prune.choosing import choose
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.formats.gguf.write import write_gguf
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery

EXACT, GELU, FLASH = 1e-5, 2e-3, 3e-3
PACKED = {
    "qwen3": "block=1,mlp=2,attn=3",
    "qwen3_moe": "mlp=1,attn=2",
    "qwen2_moe": "block=0,mlp=1,attn=2",
    "phi3": "block=0,mlp=1,attn=2",
    "gemma2": "block=1,2",
    "gemma3_text": "block=6",
    "gpt2": "mlp=1,attn=2",
    "stablelm": "block=1",
    "starcoder2": "mlp=0,attn=1",
    "nemotron": "block=3,mlp=0,attn=1",
    "falcon": "block=1",
    "bloom": "mlp=2,attn=3",
}
pytestmark = NEEDS_LLAMACPP


def pruned_and_file(tmp_path, family, spec, zeros):
    """torch's logits for the pruned and the dense model, and the pruned file."""
    model = tiny_model(family, blocks=7 if family == "gemma3_text" else 4)
    outline = summarize(model, discover(model))
    surgery = plan_surgery(outline, choose(outline, spec), model)
    dense = family_gguf(tmp_path / "dense.gguf", model)
    report = write_gguf(dense, tmp_path / "pruned.gguf", surgery, zeros=zeros)
    assert report.architecture != "deci"
    pruned = apply_surgery(copy.deepcopy(model), surgery)
    with torch.inference_mode():
        wants = [m(torch.tensor([IDS]), use_cache=False).logits[0].float().numpy() for m in (pruned, model)]
    return *wants, tmp_path / "pruned.gguf"


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("zeros", [False, True])
def test_a_file_of_any_family_gives_the_logits_of_the_pruned_model(tmp_path, family, zeros):
    spec = "attn=0,2,mlp=1" if zeros else PACKED[family]
    want, whole, file = pruned_and_file(tmp_path, family, spec, zeros)
    ((exact, flash),) = llamacpp(tmp_path, file)
    rounded = family in ("gemma2", "gemma3_text", "gpt2", "starcoder2", "falcon", "bloom")
    assert error(exact, want) < (GELU if rounded else EXACT)
    assert error(flash, want) < FLASH
    assert error(want, whole) > 2e-2
