"""However a pruned model is saved again, its folder loads elsewhere by trust_remote_code, as the model it was."""

import json
import shutil

import pytest
import torch
import transformers.utils.hub as hub
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dropformer.prune.loading.load import load

IDS = torch.arange(3, 15)[None]
ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert "dropformer" not in sys.modules
    with torch.no_grad():
        print("GIVES", float(model(torch.arange(3, 15)[None]).logits.double().abs().sum()))
"""


@pytest.fixture
def small(written):
    """A checkpoint without an attention layer and an MLP layer, one attention of which sees a window."""
    return written("attn=1,mlp=2,window=3@4+1")


def total(model):
    with torch.no_grad():
        return float(model.eval()(IDS).logits.double().abs().sum())


def trained(small, folder):
    """Two steps of Trainer: (its model, the folder of save_model, that of its last checkpoint)."""
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    how = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(load(small), how, train_dataset=data)
    trainer.train()
    trainer.save_model(str(folder / "last"))
    return trainer.model, folder / "last", folder / "checkpoint-2"


def merged(small, folder):
    """An adapter that is saved, loaded onto a fresh copy of the model, and merged into it."""
    how = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load(small), how).save_pretrained(folder / "adapter")
    model = PeftModel.from_pretrained(load(small), folder / "adapter").merge_and_unload()
    model.save_pretrained(folder / "merged")
    return model, folder / "merged"


def pushed(small, folder, monkeypatch):
    """What push_to_hub would upload; the network alone is not there."""

    class Network:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def create_branch(self, *_, **__):
            raise AssertionError("no branch was asked for")

        def create_commit(self, repo_id, operations, **_):
            for operation in operations:
                target = folder / operation.path_in_repo
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(operation.path_or_fileobj, target)

    monkeypatch.setattr(hub, "hf_api", Network)
    model = load(small)
    model.push_to_hub("me/small")
    return model, folder


def test_every_way_of_saving_again_loads_elsewhere(small, tmp_path, elsewhere, monkeypatch):
    model, last, checkpoint = trained(small, tmp_path / "trained")
    want = {last: total(model), checkpoint: total(model)}
    model, folder = merged(small, tmp_path)
    want[folder] = total(model)
    model, folder = pushed(small, tmp_path / "pushed", monkeypatch)
    want[folder] = total(model)
    for _ in range(2):
        model.save_pretrained(tmp_path / "twice")
    AutoModelForCausalLM.from_pretrained(tmp_path / "twice").save_pretrained(tmp_path / "thrice", max_shard_size="10KB")
    want[tmp_path / "twice"] = want[tmp_path / "thrice"] = total(model)
    assert all("auto_map" in json.loads((folder / "config.json").read_text()) for folder in want)
    moved = [shutil.move(folder, tmp_path / f"moved-{i}") for i, folder in enumerate(want)]
    done = elsewhere(ELSEWHERE, *moved)
    assert done.returncode == 0, done.stderr
    got = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("GIVES")]
    assert got == pytest.approx(list(want.values()), rel=1e-5)
    assert len({round(value, 3) for value in got}) == 3  # trained, merged, as it was
