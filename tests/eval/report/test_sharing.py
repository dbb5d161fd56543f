"""`evaluate DENSE PRUNED` holds the kept weights once."""

import torch

from dropformer import api
from dropformer.eval.report.run import opened_together
from dropformer.progress import Silent
from dropformer.prune.surgery.views import share_equal
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


def test_only_what_differs_is_held_beside_the_dense_weights(tiny):
    dense, other = tiny("llama"), tiny("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert held(dense, other) == 2 * held(dense)
    shared = share_equal(other, dense)
    changed = other.model.layers[1].mlp.down_proj.weight
    assert held(dense, other) == held(dense) + changed.nbytes and shared == held(dense) - changed.nbytes
    assert changed is not dense.model.layers[1].mlp.down_proj.weight


def test_tied_weights_stay_tied_and_other_number_types_apart(tiny):
    dense, tied = tiny("llama", tie_word_embeddings=True), tiny("llama", tie_word_embeddings=True)
    share_equal(tied, dense)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight is dense.lm_head.weight
    rounded = tiny("llama").bfloat16()
    assert share_equal(rounded, tiny("llama")) == 0


def test_norms_of_equal_numbers_share_any_of_them_and_the_model_gives_the_same(tiny, ids):
    dense, other = tiny("llama"), tiny("llama")
    before = other(ids).logits
    share_equal(other, dense)
    assert torch.equal(other(ids).logits, before)
