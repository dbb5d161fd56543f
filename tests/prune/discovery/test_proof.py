"""A false finding is refused before anything is built on it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dropformer.prune.architecture import Architecture, Block, Tap
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.proof import prove
from dropformer.prune.errors import ArchitectureError

D = 8


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Sequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.mlp = Mix(), nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Parallel(Sequential):
    def forward(self, x):
        h = self.norm1(x)
        return x + self.attn(h) + self.mlp(h)


class Scaled(Sequential):
    """A stream multiplied by constants of the block, as in MiniMax."""

    def forward(self, x):
        x = 0.9 * x + 0.5 * self.attn(self.norm1(x))
        return 0.8 * x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.layers = nn.ModuleList([block(), block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def found(block) -> tuple[nn.Module, Architecture, dict]:
    torch.manual_seed(0)
    model, inputs = Model(block), {"x": torch.randn(2, 5, D)}
    return model, discover(model, inputs), inputs


def changed(architecture: Architecture, kind: str, **fields) -> Architecture:
    """The architecture with one branch of block 1 told differently."""
    stack = architecture.stacks[0]
    block: Block = stack.blocks[1]
    branches = tuple(replace(b, **fields) if b.kind == kind else b for b in block.branches)
    return Architecture((replace(stack, blocks=(stack.blocks[0], replace(block, branches=branches))),))


@pytest.mark.parametrize("block", [Sequential, Parallel, Scaled])
def test_a_true_finding_is_proven(block):
    prove(*found(block))


def test_a_branch_whose_end_is_not_among_its_modules_is_refused():
    model, architecture, inputs = found(Sequential)
    wrong = changed(architecture, "attn", modules={"norm1": "input"})
    with pytest.raises(ArchitectureError, match=r"block 1 \(layers.1\), attn branch: .* unchanged"):
        prove(model, wrong, inputs)


def test_a_tap_after_another_branch_is_refused():
    model, architecture, inputs = found(Sequential)
    wrong = changed(architecture, "attn", after=Tap("layers.1", "output"))
    with pytest.raises(ArchitectureError, match="unchanged"):
        prove(model, wrong, inputs)


def test_a_parallel_branch_that_still_adds_something_is_refused():
    model, architecture, inputs = found(Parallel)
    wrong = changed(architecture, "mlp", modules={"mlp.0": "input"})
    with pytest.raises(ArchitectureError, match="still adds something"):
        prove(model, wrong, inputs)


def test_contributions_that_do_not_add_up_to_the_block_are_refused():
    model, architecture, inputs = found(Parallel)
    wrong = changed(architecture, "mlp", delta=(Tap("layers.1.attn", "output"),), modules={"attn": "zeros"})
    with pytest.raises(ArchitectureError, match="do not add up"):
        prove(model, wrong, inputs)


def test_a_form_that_breaks_the_block_is_refused_with_its_error():
    model, architecture, inputs = found(Sequential)
    wrong = changed(architecture, "mlp", modules={"mlp": ["zeros", None]})
    with pytest.raises(ArchitectureError, match="does not run without it: TypeError"):
        prove(model, wrong, inputs)


def test_an_offset_that_a_dropped_branch_leaves_behind_is_no_unchanged_stream():
    model, architecture, inputs = found(Sequential)
    model.layers[1].attn.qkv.weight.data.zero_()
    wrong = changed(architecture, "attn", modules={"norm1": "input"})
    with pytest.raises(ArchitectureError, match="unchanged"):
        prove(model, wrong, inputs)


def test_the_proof_leaves_the_model_as_it_was():
    model, architecture, inputs = found(Sequential)
    model.train()
    modules = dict(model.named_modules())
    prove(model, architecture, inputs)
    assert dict(model.named_modules()) == modules and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
