"""Block by block gives what the model gives, and resuming reuses what did not change."""

from typing import Any

import pytest
import torch
from torch import nn

from dropformer.metrics.blockwise import divergence
from dropformer.metrics.blockwise.divergence import DenseReference, dropped_modules
from dropformer.metrics.blockwise.runner import BlockRunner, check_blockwise
from dropformer.metrics.blockwise.variant import variant
from dropformer.prune.architecture import Layer
from dropformer.prune.discovery.discover import discover
from dropformer.prune.errors import ArchitectureError, ModelError
from dropformer.prune.loading.parts import replaced

FAMILIES = ["llama", "gpt2", "gemma2", "gpt_neox", "mixtral"]
SIZES = {"gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4}}


def stepper_of(tiny, family, ids):
    model = tiny(family, **SIZES.get(family, {"num_hidden_layers": 3}))
    architecture = discover(model)
    return model, architecture, BlockRunner(model, architecture, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}])


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_called_one_by_one_give_the_models_logits(tiny, ids, family):
    model, _, runner = stepper_of(tiny, family, ids)
    with torch.inference_mode():
        for batch in range(2):
            logits = runner.logits(batch, runner.run(0, batch, runner.start(batch)))
            torch.testing.assert_close(logits, model(ids[batch : batch + 1]).logits)


@pytest.mark.parametrize("family", ["llama", "granitemoe", "granitemoehybrid"])  # the last two do not name `use_cache`
def test_blocks_remember_nothing_of_an_earlier_call(tiny, ids, family):
    hybrid = {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["linear_attention", "full_attention"] * 2}
    model = tiny(family, num_hidden_layers=4, **(hybrid if family == "granitemoehybrid" else {}))
    runner = BlockRunner(model, discover(model), [{"input_ids": ids}])
    with torch.inference_mode():
        runner.run(0, 0, runner.start(0).flip(1))
        found = runner.logits(0, runner.run(0, 0, runner.start(0)))
        torch.testing.assert_close(found, model(ids, use_cache=False).logits)


class Remembering(nn.Module):
    """A block's attention that also adds what it gave before."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own, self.last = own, 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        now, *rest = self.own(*args, **kwargs)
        self.last = (before := self.last) + now.detach()
        return now + before, *rest


def test_a_model_whose_blocks_remember_is_refused(tiny, ids):
    model, architecture, runner = stepper_of(tiny, "llama", ids)
    check_blockwise(runner, architecture)
    model.model.layers[1].self_attn = Remembering(model.model.layers[1].self_attn)
    with pytest.raises(ArchitectureError, match="keep some of it"):
        check_blockwise(runner, architecture)


class Masking(nn.Module):
    """A head that never writes some words, as Chameleon's writes no images."""

    def __init__(self, own: nn.Linear, low: float) -> None:
        super().__init__()
        self.own, self.low, self.weight = own, low, own.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        barred = torch.arange(len(self.weight)) < 3
        return self.own(x).masked_fill(barred, self.low)


@pytest.mark.parametrize("low", [-float("inf"), torch.finfo(torch.float32).min])
def test_words_that_are_never_written_add_nothing_to_a_divergence(tiny, ids, low):
    model = tiny("llama", num_hidden_layers=3)
    model.lm_head = Masking(model.lm_head, low)
    architecture = discover(model)
    runner = BlockRunner(model, architecture, [{"input_ids": ids}])
    check_blockwise(runner, architecture)
    (found,) = DenseReference(runner).compare_each([variant(model, architecture, [Layer("mlp", 2)])])
    assert found.kl.isfinite().all() and (found.kl > 0).all()


def test_logits_that_are_no_numbers_are_refused(tiny, ids):
    model, architecture, runner = stepper_of(tiny, "llama", ids)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    for measure in (DenseReference, lambda runner: check_blockwise(runner, architecture)):
        with pytest.raises(ModelError, match="no finite logits in float32"):
            measure(runner)


def test_the_model_is_as_it_was_after_a_replacement(tiny, ids):
    model, architecture, runner = stepper_of(tiny, "llama", ids)
    before = [id(m) for m in model.modules()]
    DenseReference(runner).compare_each([variant(model, architecture, [Layer("attn", 1)])])
    assert [id(m) for m in model.modules()] == before


def test_resuming_at_the_first_changed_block_gives_the_whole_passs_damage(tiny, ids):
    model, architecture, runner = stepper_of(tiny, "llama", ids)
    dense = DenseReference(runner)
    (again,) = dense.compare_each([variant(model, architecture, [])])
    before = runner.work.spent
    (resumed,) = dense.compare_each([variant(model, architecture, [Layer("mlp", 2)])])
    assert runner.work.spent - before < ids.numel()  # what is left of the last of three blocks
    with replaced(model, dropped_modules(model, architecture, [Layer("mlp", 2)])), torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        )
    torch.testing.assert_close(resumed.nll, losses.double().mean(1), rtol=1e-5, atol=1e-5)
    assert resumed.mean_kl > 10 * abs(again.mean_kl)  # and the model is whole again


@pytest.mark.parametrize("stride", [1, 3])
def test_a_few_logits_at_a_time_give_what_all_at_once_give(tiny, ids, monkeypatch, stride):
    model, architecture, runner = stepper_of(tiny, "llama", ids)
    found = []
    for limit in (1 << 20, 4 * 64 * 2):  # of 64 words: all positions, or two at a time
        monkeypatch.setattr(divergence, "LOGITS", limit)
        dense = DenseReference(runner, stride)
        assert (len(dense._parts(0)) == 1) == (limit == 1 << 20)
        found += [(dense.divergence, *dense.compare_each([variant(model, architecture, [Layer("attn", 1)])]))]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close((one.kl, one.nll), (other.kl, other.nll))
    assert float(found[0][1].kl.min()) > 0


def test_padding_changes_nothing(tiny, ids):
    model, architecture, _ = stepper_of(tiny, "llama", ids)
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], 1)
    real = torch.cat([torch.ones_like(ids), torch.zeros(2, 4, dtype=torch.long)], 1)
    short = DenseReference(BlockRunner(model, architecture, [{"input_ids": ids}]))
    long = DenseReference(
        BlockRunner(model, architecture, [{"input_ids": padded, "attention_mask": real}]), scored=[real.bool()]
    )
    torch.testing.assert_close(long.divergence.nll, short.divergence.nll, rtol=1e-3, atol=1e-3)


def test_windows_that_share_a_batch_count_as_they_do_alone(tiny, ids):
    """Short answers at different places of their windows: a stride over those of all would miss some."""
    model, architecture, _ = stepper_of(tiny, "llama", ids)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    scored[0, 3:6] = scored[1, 8:] = True
    alone = BlockRunner(model, architecture, [{"input_ids": row[None]} for row in ids])
    both = BlockRunner(model, architecture, [{"input_ids": ids}])
    want, found = DenseReference(alone, 4, [row[None] for row in scored]), DenseReference(both, 4, [scored])
    torch.testing.assert_close(found.divergence.nll, want.divergence.nll, rtol=1e-3, atol=1e-3)


def test_a_model_of_two_stacks_is_refused(tiny):
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=64))
    with pytest.raises(ArchitectureError, match="one stack"):
        BlockRunner(model, discover(model), [])
