"""`evaluate DENSE PRUNED` holds the kept weights once."""

import torch

from dropformer import api
from dropformer.eval.report.run import opened_together
from dropformer.progress import Silent
from dropformer.recipes.placement import Placement


def held(*models) -> int:
    """Bytes of all parameters' memory, each once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


def pruned_folder(folder, spec, out):
    opened = api.open_model(folder)
    plan = api.plan_unscored(opened.ref, api.outline(opened.model), spec, (), None)
    api.save(api.drop(opened, plan), out)
    return out


def test_opened_together_kept_weights_are_held_once(lettered, here):
    out = pruned_folder(lettered, "attn=1,block=2", here / "pruned")
    dense, pruned = opened_together([str(lettered), str(out)], Placement(), Silent())
    assert held(dense.model, pruned.model) == held(dense.model)
    alone = api.open_model(out).model
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(pruned.model(ids).logits, alone(ids).logits)
