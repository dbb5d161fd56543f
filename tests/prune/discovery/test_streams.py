"""Blocks with two streams, blocks that run once for each segment of a text, attention that depends on its length."""

import pytest
import torch
from torch import nn
from transformers import (
    BigBirdConfig,
    BigBirdForMaskedLM,
    ReformerConfig,
    ReformerModelWithLMHead,
    RwkvConfig,
    RwkvForCausalLM,
)

import dropformer
from dropformer import api
from dropformer.eval.cost.timing import Setting, time_run
from dropformer.metrics.analysis.analyze import analyze_model
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.discovery.discover import discover
from dropformer.prune.errors import ArchitectureError

VOCAB, WIDTH, SEGMENT, LAYERS = 32, 16, 4, 4


class Attention(nn.Module):
    """One head that attends to a memory and to its own segment."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h, memory=None):
        seen = h if memory is None else torch.cat([memory, h], dim=1)
        k, v = self.kv(seen).chunk(2, -1)
        scores = self.q(h) @ k.transpose(1, 2) / WIDTH**0.5
        n, m = scores.shape[1:]
        later = torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
        return self.o(scores.masked_fill(later, -1e9).softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm1, self.norm2 = Attention(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, h, memory=None):
        h = self.norm1(h + self.attn(h, memory))
        return self.norm2(h + self.ff(h))


class TransformerXL(nn.Module):
    """Reads a text segment by segment; memories are [layer, batch, tokens, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, ids, mems=None):
        out = []
        for part in ids.split(SEGMENT, dim=1):
            h, new = self.embed(part), []
            for i, layer in enumerate(self.layers):
                new.append(h)
                h = layer(h, None if mems is None else mems[i])
            mems = torch.stack(new)
            out.append(h)
        return self.head(torch.cat(out, dim=1))


@pytest.fixture
def xl():
    torch.manual_seed(0)
    return TransformerXL().eval()


def some_ids(batch, length=3 * SEGMENT):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", ["attn=1", "attn=3", "mlp=0", "block=1"])
def test_a_state_is_handed_on_by_what_is_dropped(spec):
    """RWKV's modules hand on one state for all blocks, which is None where nothing is cached."""
    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 4, "context_length": 32, "rescale_every": 0}
    model = RwkvForCausalLM(RwkvConfig(**shape)).eval()
    small = api.drop(model, api.plan_unscored(ModelRef(name="rwkv"), api.outline(model), spec, (), None))
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        whole, read = small(ids).logits, small(ids[:, :-1], use_cache=True)
        step = small(ids[:, -1:], use_cache=True, state=read.state).logits
    torch.testing.assert_close(step[:, -1], whole[:, -1])
    run = time_run(small, Setting(prompt=8, new=2))
    assert run.decode.wall > 0 and run.kv_bytes == 0


@pytest.mark.parametrize("batch", [1, 3, LAYERS])
def test_every_segment_counts_and_memories_by_layer_are_no_batch(xl, batch):
    mems = torch.randn(LAYERS, batch, SEGMENT, WIDTH, generator=torch.Generator().manual_seed(2))
    scores = dropformer.analyze(xl, [{"mems": mems, "ids": some_ids(batch)}])
    assert (scores.windows, scores.tokens) == (batch, batch * 3 * SEGMENT)
    streams = []
    hook = xl.layers[2].attn.register_forward_hook(lambda _m, args, out: streams.append((args[0], args[0] + out)))
    with torch.no_grad():
        xl(some_ids(batch), mems)
    hook.remove()
    by_hand = torch.cat([torch.cosine_similarity(x, y, dim=-1) for x, y in streams], dim=1).mean()
    assert scores.similarity()[Layer("attn", 2)] == pytest.approx(float(by_hand), abs=1e-6)


@pytest.mark.parametrize("spec", ["attn=1,2", "mlp=0", "attn=3,mlp=1"])
def test_a_drop_takes_a_branch_from_every_segment(xl, spec):
    scores = dropformer.analyze(xl, [some_ids(2)])
    plan = dropformer.plan(scores, spec)
    pruned = dropformer.drop(xl, plan)
    hooks = [
        (xl.layers[layer.index].attn if layer.kind == "attn" else xl.layers[layer.index].ff).register_forward_hook(
            lambda _m, _args, out: torch.zeros_like(out)
        )
        for layer in plan.layers
    ]
    with torch.no_grad():
        want = xl(some_ids(2))
        for hook in hooks:
            hook.remove()
        assert torch.allclose(pruned(some_ids(2)), want, atol=1e-6)
        assert not torch.allclose(xl(some_ids(2)), want, atol=1e-3)


def test_a_block_that_runs_again_in_depth_is_still_refused(xl):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = xl.embed, xl.layers

        def forward(self, ids):
            h = self.embed(ids)
            for layer in (*self.layers, *self.layers):
                h = layer(h)
            return h

    with pytest.raises(ArchitectureError, match="runs 2 times a pass with the same weights"):
        discover(Twice(), {"ids": some_ids(2)})


@pytest.fixture
def reformer():
    torch.manual_seed(0)
    config = ReformerConfig(
        attn_layers=["local", "lsh", "local", "lsh"], hidden_size=32, attention_head_size=8, num_attention_heads=4,
        feed_forward_size=48, axial_pos_shape=[4, 16], axial_pos_embds_dim=[8, 24], local_attn_chunk_length=4,
        lsh_attn_chunk_length=4, num_buckets=2, vocab_size=64, max_position_embeddings=64, is_decoder=True,
        eos_token_id=2,
    )  # fmt: skip
    return ReformerModelWithLMHead(config).eval()


def seeded(model, ids):
    torch.manual_seed(3)  # Reformer draws its hash functions anew at every pass
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("spec", ["attn=0,2", "mlp=1", "block=1,2"])
def test_reversible_branches_drop_export_and_reload(reformer, spec, tmp_path):
    ids = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))
    reformer.save_pretrained(tmp_path / "dense")
    opened = dropformer.open_model(tmp_path / "dense")
    scores = analyze_model(opened.model, [{"input_ids": ids}], ref=opened.ref)
    plan = dropformer.plan(scores, spec)
    pruned = dropformer.drop(opened, plan)
    hooks = []
    for layer in (x for x in plan.outline.branch_layers(plan.layers)):
        block = reformer.reformer.encoder.layers[layer.index]
        if layer.kind == "attn":
            module, silence = block.attention.output, lambda _m, _args, out: torch.zeros_like(out)
        else:
            module, silence = block.feed_forward, lambda _m, _args, out: torch.zeros_like(out)
        hooks.append(module.register_forward_hook(silence))
    if "lsh" not in {reformer.config.attn_layers[x.index] for x in plan.layers if x.kind != "mlp"}:
        assert torch.allclose(seeded(pruned, ids), seeded(reformer, ids), atol=1e-5)
    dropformer.save(pruned, tmp_path / "out")
    again = dropformer.load(tmp_path / "out")
    assert torch.equal(seeded(again, ids), seeded(pruned, ids))
    made = again.generate(ids, max_new_tokens=2, do_sample=False, use_cache=False)
    assert made.shape == (2, 12)


def test_each_reversible_stream_has_its_own_similarity_and_a_block_that_of_both(reformer):
    ids = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(1))
    scores = analyze_model(reformer, [{"input_ids": ids}]).similarity()
    seen = {}
    block = reformer.reformer.encoder.layers[0]  # its attention is local, without random hashes
    hook = block.register_forward_hook(
        lambda _m, _args, given, out: seen.update(given=given, out=out), with_kwargs=True
    )
    seeded(reformer, ids)
    hook.remove()
    before = seen["given"]["prev_attn_output"], seen["given"]["hidden_states"]
    after = seen["out"].attn_output, seen["out"].hidden_states
    both = torch.cat(before, -1), torch.cat(after, -1)
    for kind, x, y in (("attn", before[0], after[0]), ("mlp", before[1], after[1]), ("block", *both)):
        by_hand = float(torch.cosine_similarity(x, y, dim=-1).mean())
        assert scores[Layer(kind, 0)] == pytest.approx(by_hand, abs=1e-5), kind


@pytest.fixture
def big_bird():
    torch.manual_seed(0)
    config = BigBirdConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=64,
        pad_token_id=0, sep_token_id=3, max_position_embeddings=128, block_size=4, num_random_blocks=1,
    )  # fmt: skip
    return BigBirdForMaskedLM(config).eval()


def test_big_bird_is_scored_with_the_attention_that_each_length_gets(big_bird):
    draw = torch.Generator().manual_seed(1)
    short, long = (torch.randint(4, 64, (1, n), generator=draw) for n in (12, 64))
    alone = analyze_model(big_bird, [{"input_ids": long}]).similarity()
    assert big_bird.bert.attention_type == "block_sparse"
    after = analyze_model(big_bird, [{"input_ids": short}, {"input_ids": long}])
    first = analyze_model(big_bird, [{"input_ids": short}]).similarity()
    assert big_bird.bert.attention_type == "block_sparse"
    for layer, value in after.similarity().items():
        assert value == pytest.approx((12 * first[layer] + 64 * alone[layer]) / 76, abs=1e-5)


@pytest.mark.parametrize("spec", ["attn=1,2", "mlp=3", "block=1,3"])
def test_a_pruned_big_bird_runs_at_any_length(big_bird, spec, tmp_path):
    big_bird.save_pretrained(tmp_path / "dense")
    opened = dropformer.open_model(tmp_path / "dense")
    plan = api.plan_unscored(opened.ref, api.outline(opened.model), spec, (), None)
    pruned = dropformer.drop(opened, plan)
    dropformer.save(pruned, tmp_path / "out")
    again = dropformer.load(tmp_path / "out")
    draw = torch.Generator().manual_seed(1)
    for length in (64, 12, 50, 5):
        ids = torch.randint(4, 64, (2, length), generator=draw)
        with torch.no_grad():
            assert torch.allclose(again(ids).logits, pruned(ids).logits, atol=1e-5)
            if length == 64:
                dense = big_bird(ids).logits
                assert not torch.allclose(dense, pruned(ids).logits, atol=1e-4)
    fresh = dropformer.load(tmp_path / "out")
    fresh.bert.set_attention_type("original_full")
    with torch.no_grad():
        assert torch.allclose(fresh(ids).logits, again(ids).logits, atol=1e-5)
