"""A model gets the parameters of another that are the same bit for bit."""

import torch

from dropformer.prune.surgery.views import share_equal


def held(*models) -> int:
    """Bytes of all parameters' memory, each once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


def test_only_what_differs_is_held_beside_the_dense_weights(tiny):
    dense, other = tiny("llama"), tiny("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert held(dense, other) == 2 * held(dense)
    shared, changed = share_equal(other, dense), other.model.layers[1].mlp.down_proj.weight
    assert held(dense, other) == held(dense) + changed.nbytes
    assert 0 < held(dense) - changed.nbytes - shared < 9 * dense.model.norm.weight.nbytes  # norms of ones are one
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
