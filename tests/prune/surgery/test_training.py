"""A pruned model trains like any other: LoRA by peft, from memory and from a checkpoint."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dropformer.prune.loading.load import load


@pytest.fixture
def checkpoint(written):
    return written("attn=1,mlp=2")


def train(model, ids, steps=12):
    """The loss before and after a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def test_lora_trains_on_what_is_left_and_its_adapter_reloads(checkpoint, ids, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(load(checkpoint), lora)
    adapted = {name.split(".layers.")[1].split(".")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"0", "2", "3"}  # block 1 has lost its attention
    before, after = train(model, ids)
    assert after < before
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_a_merged_adapter_is_saved_as_a_pruned_checkpoint(checkpoint, ids, tmp_path):
    model = get_peft_model(load(checkpoint), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    train(model, ids, 3)
    merged = model.eval().merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged")(ids).logits, merged(ids).logits)
