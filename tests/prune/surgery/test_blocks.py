"""A block that is more than its branches: one with a norm after them, one with a part that must stay."""

import copy

import pytest
import torch

from dropformer.prune.block_map import Surgery, map_blocks
from dropformer.prune.choosing import choose
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import PlanError
from dropformer.prune.plan import make_plan
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery

BART = {"d_model": 32, "decoder_layers": 4, "encoder_layers": 4, "decoder_ffn_dim": 48, "decoder_attention_heads": 4}
SHARED = {"default_language": "en_XX", "languages": ["en_XX"], "is_decoder": True}

ENDS = {"bert": ("attention.output.dense", "output.dense"), "bart": ("self_attn.out_proj", "fc2")}


def trained(model):
    """The model with norms that are not the identity, as training leaves them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def outline(model):
    return summarize(model, discover(model))


def in_place(model, spec):
    found = outline(model)
    layers = choose(found, spec)
    return apply_surgery(copy.deepcopy(model), Surgery(found, tuple(layers), map_blocks(found, layers, shorten=False)))


def without_blocks(model, ids, path, gone):
    """Logits of the dense model with some blocks handing on what they were given."""
    blocks = model.get_submodule(path)
    hooks = [blocks[i].register_forward_hook(give_back, with_kwargs=True) for i in gone]
    found = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return found


def without_branches(model, path, ends, blocks=(1,)):
    """A copy whose branches in these blocks end in zeros."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for end in (copied.get_submodule(f"{path}.{i}.{name}") for i in blocks for name in ends):
            end.weight.zero_()
            end.bias.zero_()
    return copied


def give_back(_module, args, kwargs, output):
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@pytest.mark.parametrize(
    "family, path, changes",
    [("bert", "bert.encoder.layer", {"is_decoder": True}), ("bart", "model.decoder.layers", BART)],
)
class TestPostNorm:
    def test_a_dropped_block_takes_its_norms_along(self, tiny, ids, family, path, changes):
        model = trained(tiny(family, **changes))
        want = without_blocks(model, ids, path, (1, 2))
        found = outline(model)
        short = copy.deepcopy(model)
        surgery = plan_surgery(found, choose(found, "block=1,2"), short)
        apply_surgery(short, surgery)
        assert surgery.block_map.packed and len(short.get_submodule(path)) == 2
        for small in (short, in_place(model, "block=1,2")):
            torch.testing.assert_close(small(ids, use_cache=False).logits, want, rtol=1e-5, atol=1e-5)

    def test_its_branches_leave_the_norms_behind(self, tiny, ids, family, path, changes):
        model = trained(tiny(family, **changes))
        found = outline(model)
        small = copy.deepcopy(model)
        surgery = plan_surgery(found, choose(found, "attn=1,mlp=1"), small)
        assert len(surgery.block_map.stacks[""]) == 4
        got = apply_surgery(small, surgery)(ids, use_cache=False).logits
        want = without_branches(model, path, ENDS[family])(ids, use_cache=False).logits
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, without_blocks(model, ids, path, (1,)), atol=1e-4)

    def test_a_plan_counts_the_norms_of_a_block(self, tiny, ids, family, path, changes):
        model = trained(tiny(family, **changes))
        found = outline(model)
        plan = make_plan(found, {"name": "m"}, "block=1", choose(found, "block=1"))
        small = in_place(model, "block=1")
        assert plan.savings.parameters_after == sum(p.numel() for p in small.parameters())


class TestKeptPart:
    def test_the_block_stays_when_the_rest_of_it_goes(self, tiny, ids):
        model = tiny("xmod", **SHARED)
        found = outline(model)
        assert set(found.stacks[0].block(1).kept) == {"mlp"}
        small = copy.deepcopy(model)
        apply_surgery(small, plan_surgery(found, choose(found, "attn=1,2"), small))
        want = without_branches(model, "roberta.encoder.layer", ("attention.output.dense",), (1, 2))
        torch.testing.assert_close(small(ids).logits, want(ids).logits, rtol=1e-5, atol=1e-5)

    def test_the_block_cannot_be_named_as_a_whole(self, tiny):
        with pytest.raises(PlanError, match="which must stay: MLP: it shares its last module"):
            choose(outline(tiny("xmod", **SHARED)), "block=1")


def test_an_empty_block_keeps_its_settings(tiny):
    model = tiny("bert", is_decoder=True)
    before = model.bert.encoder.layer[1].chunk_size_feed_forward
    block = in_place(model, "block=1").bert.encoder.layer[1]
    assert block.chunk_size_feed_forward == before
    assert not list(block.parameters())


@pytest.mark.parametrize("family", ["phi", "falcon", "gpt_neox", "llama"])
def test_a_block_that_loses_its_branches_one_by_one_is_counted_as_a_whole(tiny, family):
    """Parallel branches may share a norm, which belongs to neither and goes with the last."""
    fields = {"new_decoder_architecture": False, "multi_query": False} if family == "falcon" else {}
    model = tiny(family, **fields)
    found = outline(model)
    layers = choose(found, "attn=1,mlp=1,mlp=2")
    pruned = apply_surgery(copy.deepcopy(model), plan_surgery(found, layers, model))
    left = sum(p.numel() for p in pruned.parameters())
    assert found.parameters - found.dropped_parameters(layers) == left
