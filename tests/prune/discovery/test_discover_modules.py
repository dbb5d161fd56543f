"""Any torch module: attention written by hand, opaque names, in-place sums, torch's own encoder."""

import pytest
import torch
from torch import nn

import dropformer
from dropformer.prune.architecture import Architecture
from dropformer.prune.discovery.discover import describe, discover
from dropformer.prune.discovery.proof import on_tap, prove
from dropformer.prune.discovery.replay import skipped
from dropformer.prune.errors import ArchitectureError, ModelError

D, T = 16, 6


class Linformer(nn.Module):
    """Keys and values projected along the tokens (arXiv 2006.04768)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.shorten, self.out = nn.Linear(D, 3 * D), nn.Linear(T, 3), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        k, v = (self.shorten(t.transpose(1, 2)).transpose(1, 2) for t in (k, v))
        return self.out((q @ k.transpose(1, 2) / D**0.5).softmax(-1) @ v)


class Performer(nn.Module):
    """Attention by positive random features (arXiv 2009.14794)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.register_buffer("features", torch.randn(D, 8))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = ((t @ self.features / D**0.5).exp() for t in (q, k))
        return self.out(q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1)[..., None]))


class Strided(nn.Module):
    """Sparse attention: every token sees the tokens at its own parity."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.register_buffer("seen", (torch.arange(T)[:, None] - torch.arange(T)) % 2 == 0)

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return self.out(scores.masked_fill(~self.seen, -torch.inf).softmax(-1) @ self.v(x))


class Block(nn.Module):
    """A pre-norm block whose parts have names that say nothing."""

    def __init__(self, part):
        super().__init__()
        self.a, self.b = nn.LayerNorm(D), nn.LayerNorm(D)
        self.one = part()
        self.two = nn.Sequential(nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D))

    def forward(self, x):
        x = x + self.one(self.a(x))
        return x + self.two(self.b(x))


class InPlace(Block):
    def forward(self, x):
        x = x.clone()
        x += self.one(self.a(x))
        x += self.two(self.b(x))
        return x


class Encoder(nn.Module):
    def __init__(self, part, block=Block, depth=3):
        super().__init__()
        self.inp = nn.Linear(D, D)
        self.stages = nn.ModuleList(block(part) for _ in range(depth))
        self.head = nn.Linear(D, 5)

    def forward(self, x):
        x = self.inp(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


@pytest.fixture
def batch():
    return {"x": torch.randn(2, T, D, generator=torch.Generator().manual_seed(0))}


def proven(model: nn.Module, inputs) -> Architecture:
    architecture = discover(model, inputs)
    prove(model, architecture, inputs)
    return architecture


@pytest.mark.parametrize("part", [Linformer, Performer, Strided])
def test_what_mixes_tokens_is_attention_whatever_its_name(part, batch):
    architecture = proven(Encoder(part), batch)
    block = architecture.stacks[0].blocks[1]
    assert block.branch("attn").modules == {"a": "input", "one": "zeros"}
    assert block.branch("mlp").modules == {"b": "input", "two": "zeros"}


@pytest.mark.parametrize("part", [Linformer, Performer, Strided])
def test_dropping_from_a_handwritten_model_is_leaving_the_line_out(part, batch):
    model = Encoder(part)
    block = proven(model, batch).stacks[0].blocks[1]
    with torch.no_grad():
        x = model.stages[0](model.inp(batch["x"]))
        x = x + model.stages[1].two(model.stages[1].b(x))
        want = model.head(model.stages[2](x))
        with skipped(model, block.path, block.branch("attn").modules):
            got = model(**batch)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_block_that_writes_into_its_stream_says_so(batch):
    assert proven(Encoder(Strided, InPlace), batch).stacks[0].blocks[0].inplace
    assert not proven(Encoder(Strided), batch).stacks[0].blocks[0].inplace


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x[:, :2].mul_(2), lambda x: x.__setitem__(0, 1.0)])
def test_a_trunk_that_writes_into_what_a_block_gives_or_takes_says_so(batch, write):
    class Writing(Encoder):
        def forward(self, x):
            x = self.stages[1](self.stages[0](self.inp(x)))
            write(x)
            return self.head(self.stages[2](x))

    assert [block.inplace for block in proven(Writing(Strided), batch).stacks[0].blocks] == [False, True, True]


def test_without_weights_the_operations_tell_the_kind(batch):
    with torch.device("meta"):
        model = Encoder(nn.Identity)
        model.stages = nn.ModuleList(nn.TransformerEncoderLayer(D, 2, 24, batch_first=True) for _ in range(2))
        architecture = discover(model, {"x": batch["x"].to("meta")})
    assert [[b.kind for b in block.branches] for block in architecture.stacks[0].blocks] == [["attn", "mlp"]] * 2


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_encoder_is_read_past_its_fused_path(norm_first, batch_first):
    layer = nn.TransformerEncoderLayer(D, 2, 24, norm_first=norm_first, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    inputs = {"src": torch.randn(2, T, D)}
    architecture = proven(model, inputs)
    assert torch.backends.mha.get_fastpath_enabled()
    block = architecture.stacks[0].blocks[1]
    assert block.plain == norm_first
    before = model(**inputs)
    with torch.no_grad(), skipped(model, block.path, block.branch("attn").modules):
        dropped = model(**inputs)
    model.layers[1].self_attn.out_proj.weight.data.zero_()
    model.layers[1].self_attn.out_proj.bias.data.zero_()
    torch.testing.assert_close(dropped, model(**inputs), rtol=0, atol=1e-5)
    assert not torch.allclose(before, dropped, atol=1e-3)


def test_torchs_own_encoder_decoder_has_cross_attention():
    model = nn.Transformer(D, 2, 2, 2, 24, batch_first=True)
    architecture = proven(model, {"src": torch.randn(2, T, D), "tgt": torch.randn(2, 4, D)})
    assert [b.kind for b in architecture.stack("decoder").blocks[0].branches] == ["attn", "cross", "mlp"]
    assert architecture.stack("decoder").blocks[0].branch("cross").modules == {"multihead_attn": ["zeros", None]}


def test_three_lines_describe_what_is_to_be_found(batch):
    model = Encoder(Linformer)
    told = describe(model, blocks="stages", attn="two", mlp="one", inputs=batch)
    prove(model, told, batch)
    assert told.stacks[0].blocks[0].branch("attn").modules == {"b": "input", "two": "zeros"}


@pytest.mark.parametrize("part", [Linformer, Performer, Strided])
@pytest.mark.parametrize("told", [False, True], ids=["found", "described"])
def test_a_handwritten_model_is_analyzed_planned_and_cut(part, told, batch):
    """Told, attention and MLP trade names, so that what goes shows whom analyze, plan and drop have followed."""
    model = Encoder(part)
    words = {"blocks": "stages", "attn": "two", "mlp": "one"}
    architecture = dropformer.describe(model, inputs=batch, **words) if told else None
    scores = dropformer.analyze(model, [batch, batch["x"]], architecture=architecture)
    assert scores.windows == 4 and len(scores.layers) == 9
    plan = dropformer.plan(scores, "attn=1,mlp=0")
    pruned = dropformer.drop(model, plan)
    keep = [("two",), ("one",), ("one", "two")] if told else [("one",), ("two",), ("one", "two")]
    with torch.no_grad():
        torch.testing.assert_close(pruned(**batch), without(model, keep, batch["x"]), rtol=0, atol=0)
    assert plan.savings.parameters_after == sum(p.numel() for p in pruned.parameters())


def without(model, keep, x):
    """The model's output with only these parts of each stage, each read through its norm."""
    norms = {"one": "a", "two": "b"}
    x = model.inp(x)
    for stage, parts in zip(model.stages, keep, strict=True):
        for part in parts:
            x = x + getattr(stage, part)(getattr(stage, norms[part])(x))
    return model.head(x)


def test_a_description_is_for_a_module_in_memory(batch):
    model = Encoder(Linformer)
    told = describe(model, blocks="stages", attn="one", inputs=batch)
    with pytest.raises(ModelError, match="module in memory"):
        dropformer.analyze("smollm2-135m", architecture=told)


def test_a_description_of_what_is_not_there_is_refused(batch):
    model = Encoder(Linformer)
    with pytest.raises(ArchitectureError, match="no module `layers`"):
        describe(model, blocks="layers", attn="one", inputs=batch)
    with pytest.raises(ArchitectureError, match="attn=, mlp= or cross="):
        describe(model, blocks="stages", attention="one", inputs=batch)
    with pytest.raises(ArchitectureError, match="`three`"):
        describe(model, blocks="stages", attn="three", inputs=batch)


def test_a_module_without_repeated_blocks_is_refused():
    with pytest.raises(ArchitectureError, match="describe its blocks"):
        discover(nn.Sequential(nn.Linear(D, D)), {"input": torch.randn(2, D)})


def test_a_tap_sees_what_flows_and_is_gone_when_removed(batch):
    model = Encoder(Strided)
    block = proven(model, batch).stacks[0].blocks[1]
    seen = []
    remove = on_tap(model, block.branch("attn").after, seen.append)
    with torch.no_grad():
        model(**batch)
        remove()
        model(**batch)
        x = model.stages[0](model.inp(batch["x"]))
        want = x + model.stages[1].one(model.stages[1].a(x))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], want, rtol=0, atol=0)
