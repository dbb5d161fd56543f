"""`prune` with rungs that are asked for by number, end to end, on images and on padded text."""

import json

import pytest
import torch
from command import bad, run
from transformers import ViTConfig, ViTForImageClassification


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "vit"
    config = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, num_labels=5,
                       image_size=32, patch_size=4, initializer_range=0.3)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_agents_of_a_vision_model_are_ranked_written_and_loaded_elsewhere(vit, here, elsewhere, capsys):
    out = here / "out"
    status, said, told = run("--model", vit, "--drop", "agent:2@16,mlp=0", "--out", out, capsys=capsys)
    assert status == 0
    plan, record, config = (json.loads((out / n).read_text()) for n in ("plan.json", "dropformer.json", "config.json"))
    assert list(plan["agents"].values()) == [16, 16] and plan["drops"][0]["layer"] == "mlp:0"
    assert record["agents"] == plan["agents"] and record["windows"] == {}
    forms = config["dropformer_modules"]
    assert sum(form == {"agents": 16} for form in forms.values()) == 2
    card = (out / "README.md").read_text()
    assert "16 in attn:" in card and "AutoModelForImageClassification.from_pretrained" in card
    assert "what 16 agents take, 16 samples of pixels" in told and "reloaded, logits equal" in said
    code = (
        "import torch; from transformers import AutoModelForImageClassification as A;"
        "m = A.from_pretrained('out', trust_remote_code=True);"
        "assert type(m).__name__ == 'DropformerViTForImageClassification';"
        "assert sum(getattr(x, 'agents', 0) == 16 for x in m.modules()) == 2;"
        "assert m(torch.rand(1, 3, 32, 32)).logits.isfinite().all()"
    )
    there = elsewhere(code, cwd=here)
    assert there.returncode == 0, there.stderr[-2000:]


def test_a_plan_with_agents_is_followed_on_the_files_alone(vit, here, capsys):
    assert run("--model", vit, "--drop", "agent=1,3@9", "--out", "one", capsys=capsys)[0] == 0
    assert run("--model", vit, "--plan", "one/plan.json", "--out", "two", capsys=capsys)[0] == 0
    one, two = ((here / name / "config.json").read_text() for name in ("one", "two"))
    assert one == two and '"agents": 9' in one


def test_an_evaluation_by_perplexity_is_refused_for_what_writes_no_text(vit, here, capsys):
    bad("evaluate", vit, "--quiet", capsys=capsys, here=here, said="does not write text token by token")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("window:1@16", "fits causal attention to text"),
        ("window=1@16", "is not causal"),
        ("agent:2", "agent:4@49"),
        ("attn:2@16", "only windows and agents"),
        ("agent:2@16+4", "agents `16+4` cannot be read"),
        ("agent:9@16", "takes 9 layers"),
        ("attn=1,agent=1@16", "dropped by another item"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(vit, here, capsys, spec, why):
    bad("--model", vit, "--drop", spec, "--out", "out", "--quiet", capsys=capsys, here=here, said=why)


def test_agents_are_refused_for_a_causal_model_before_any_text_is_read(lettered, here, capsys):
    bad("--model", lettered, "--drop", "agent:1@4", "--quiet", capsys=capsys, here=here, said="is causal; give window")
