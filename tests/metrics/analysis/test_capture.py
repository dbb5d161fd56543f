"""Similarity equals what a hand-written forward of each family gives; what must not count does not."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel, XLNetConfig, XLNetModel

from dropformer.metrics.analysis.analyze import analyze_model, measuring, proven
from dropformer.metrics.analysis.capture import capturing
from dropformer.prune.architecture import Layer


def expected(states: dict[Layer, tuple[torch.Tensor, torch.Tensor]]) -> dict[Layer, float]:
    """Mean cosine per layer from (before, after), in float64."""
    cosine = nn.CosineSimilarity(dim=-1)
    return {layer: cosine(x.double(), y.double()).mean().item() for layer, (x, y) in states.items()}


def recorded(modules: dict[str, nn.Module], run) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """First input and output of each module during `run()`, by plain hooks."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(name):
        def hook(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            seen[name] = (given.clone(), (output[0] if isinstance(output, tuple) else output).clone())

        return hook

    handles = [m.register_forward_hook(note(name), with_kwargs=True) for name, m in modules.items()]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def by_hand(model, inputs, parts, wire) -> dict[Layer, float]:
    """`wire(seen, i)` gives the residual stream x, h, y of block i from the recorded modules of that block."""
    blocks = parts(model)
    modules = {f"{i}.{name}": block.get_submodule(name) for i, block in enumerate(blocks) for name in wire.names}
    modules |= {f"{i}": block for i, block in enumerate(blocks)}
    seen = recorded(modules, lambda: model(**inputs))
    states = {}
    for i in range(len(blocks)):
        own = {name.partition(".")[2]: value for name, value in seen.items() if name.split(".")[0] == str(i)}
        for kind, pair in wire(own).items():
            states[Layer(kind, i)] = pair
    return expected(states)


def wiring(*names):
    def mark(function):
        function.names = names
        return function

    return mark


@wiring("self_attn", "mlp")
def llama(seen):
    x, y = seen[""]
    h = x + seen["self_attn"][1]
    assert torch.allclose(h + seen["mlp"][1], y, atol=1e-6)
    return {"attn": (x, h), "mlp": (h, y), "block": (x, y)}


@wiring("post_attention_layernorm", "post_feedforward_layernorm")
def gemma2(seen):
    x, y = seen[""]
    h = x + seen["post_attention_layernorm"][1]
    assert torch.allclose(h + seen["post_feedforward_layernorm"][1], y, atol=1e-6)
    return {"attn": (x, h), "mlp": (h, y), "block": (x, y)}


@wiring("self_attn", "mlp")
def phi(seen):
    x, y = seen[""]
    attention, mlp = seen["self_attn"][1], seen["mlp"][1]
    assert torch.allclose(x + attention + mlp, y, atol=1e-6)
    return {"attn": (x, x + attention), "mlp": (x, x + mlp), "block": (x, y)}


@wiring("attn", "mlp")
def gpt2(seen):
    x, y = seen[""]
    h = x + seen["attn"][1]
    return {"attn": (x, h), "mlp": (h, y), "block": (x, y)}


@wiring("attention.output.dense", "attention.output.LayerNorm", "output.dense")
def bert(seen):
    x, y = seen[""]
    h = seen["attention.output.LayerNorm"][1]
    return {
        "attn": (x, x + seen["attention.output.dense"][1]),
        "mlp": (h, h + seen["output.dense"][1]),
        "block": (x, y),
    }


def trunk_blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


FAMILIES = {
    "llama": (llama, {}),
    "gemma2": (gemma2, {"head_dim": 8}),
    "phi": (phi, {}),
    "qwen3": (llama, {"head_dim": 8}),
}
FAMILIES["gpt2"] = (gpt2, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48})


@pytest.mark.parametrize("family", FAMILIES)
def test_similarity_equals_that_of_a_hand_written_capture(family, tiny, ids):
    wire, changes = FAMILIES[family]
    model = tiny(family, **changes)
    scores = analyze_model(model, [{"input_ids": ids}])
    assert scores.similarity() == pytest.approx(by_hand(model, {"input_ids": ids}, trunk_blocks, wire), abs=1e-6)


def bert_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertModel(BertConfig(vocab_size=64, **shape)).eval()


def test_post_norm_layers_are_read_before_their_norm_which_stays(ids):
    model = bert_model()
    scores = analyze_model(model, [{"input_ids": ids}])
    hand = by_hand(model, {"input_ids": ids}, lambda m: m.encoder.layer, bert)
    assert scores.similarity() == pytest.approx(hand, abs=1e-6)


def test_image_models_average_over_patches():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = ViTModel(ViTConfig(image_size=16, patch_size=4, **shape)).eval()
    scores = analyze_model(model, [torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))])
    assert scores.tokens == 2 * 17
    assert all(0 < s <= 1 for s in scores.similarity().values())


def test_the_last_block_is_scored_before_the_final_norm(tiny, ids):
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-2, 5, 32))
        hidden = model(ids, output_hidden_states=True).hidden_states
    last = analyze_model(model, [ids]).similarity()[Layer("block", 3)]
    normed = nn.CosineSimilarity(dim=-1)(hidden[-2].double(), hidden[-1].double()).mean().item()
    seen = recorded({"last": model.model.layers[3]}, lambda: model(ids))["last"]
    assert last == pytest.approx(expected({Layer("block", 3): seen})[Layer("block", 3)], abs=1e-6)
    assert abs(last - normed) > 0.05


def test_padding_never_counts(tiny, ids):
    model = tiny("llama")
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    padded = ids.where(mask.bool(), 0)
    together = analyze_model(model, [({"input_ids": padded, "attention_mask": mask}, mask.bool())])
    apart = analyze_model(model, [ids[:1], ids[1:, :7]])
    assert together.tokens == apart.tokens == 19
    assert together.similarity() == pytest.approx(apart.similarity(), abs=1e-6)


def test_nan_in_padding_does_not_reach_the_scores(tiny, ids):
    model, scored = tiny("llama"), torch.ones_like(ids).bool()
    scored[:, 5:] = False
    with measuring(model, proven(model)) as run:
        clean = run(ids[:, :5], None)
        model.model.layers[3].mlp.register_forward_hook(
            lambda m, a, out: out.index_fill(1, torch.arange(5, 12), torch.nan)
        )
        spoiled = run(ids, scored)
    torch.testing.assert_close(spoiled.sums, clean.sums, atol=1e-5, rtol=0)


def test_skipped_tokens_are_run_but_not_scored(tiny, ids):
    model, scored = tiny("llama"), torch.ones_like(ids).bool()
    scored[:, :3] = False
    seen = recorded({"block": model.model.layers[1]}, lambda: model(ids))["block"]
    by_tail = expected({Layer("block", 1): (seen[0][:, 3:], seen[1][:, 3:])})
    scores = analyze_model(model, [({"input_ids": ids}, scored)])
    assert scores.tokens == 2 * 9
    assert scores.similarity()[Layer("block", 1)] == pytest.approx(by_tail[Layer("block", 1)], abs=1e-6)


def test_one_pass_without_logits(tiny, ids):
    model, calls = tiny("llama"), {"embed": 0, "head": 0}
    architecture = proven(model)

    def counting(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    model.model.embed_tokens.register_forward_hook(counting("embed"))
    model.lm_head.register_forward_hook(counting("head"))
    with measuring(model, architecture) as run:
        run(ids[:1], None), run(ids[1:], None)
    assert calls == {"embed": 2, "head": 0}


def test_scoring_leaves_no_hook_and_the_training_mode_as_it_was(tiny, ids):
    model = tiny("llama").train()
    model.model.layers[1].eval()
    analyze_model(model, [ids])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training and not model.model.layers[1].training and model.model.layers[2].training


def test_streams_are_held_for_one_block_only(tiny, ids):
    model, held = tiny("llama"), []
    with torch.no_grad(), capturing(model, proven(model)) as capture:
        model.model.layers[3].register_forward_pre_hook(lambda *_: held.append(len(capture._held)))
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: held.append(len(capture._held)))
        model.model(ids)
    assert held == [2, 1]  # block 0: before attention, before MLP; at the last block's input nothing older


class InPlaceBlock(nn.Module):
    """Adds its branches into the very tensor it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, hidden):
        stream = hidden.view_as(hidden)
        stream += self.mlp(self.norm(hidden))
        return stream


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(InPlaceBlock() for _ in range(3))

    def forward(self, ids):
        hidden = self.embed(ids).clone()
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_a_block_that_writes_into_its_stream_is_scored_against_what_was_there(ids):
    torch.manual_seed(0)
    model = InPlace().eval()
    with torch.no_grad():
        x = model.embed(ids)
        y = x + model.layers[0].mlp(model.layers[0].norm(x))
    scores = analyze_model(model, [ids]).similarity()
    want = expected({Layer("block", 0): (x, y)})[Layer("block", 0)]
    assert scores[Layer("block", 0)] == pytest.approx(want, abs=1e-6)
    assert scores[Layer("mlp", 0)] == pytest.approx(want, abs=1e-6)


def test_bfloat16_streams_are_compared_in_float32(tiny, ids):
    model = tiny("llama").bfloat16()
    seen = recorded({"block": model.model.layers[1]}, lambda: model(ids))["block"]
    scores = analyze_model(model, [ids]).similarity()
    assert scores[Layer("block", 1)] == pytest.approx(expected({Layer("block", 1): seen})[Layer("block", 1)], abs=1e-6)


def test_rows_are_one_for_each_window_of_a_batch(tiny, ids):
    model = tiny("llama")
    with measuring(model, proven(model)) as run:
        both, first, second = run({"input_ids": ids}, None), run(ids[:1], None), run(ids[1:], None)
    assert both.sums.dtype == torch.float64 and both.total() == ids.numel()
    torch.testing.assert_close(both.sums, torch.cat([first.sums, second.sums]), atol=1e-5, rtol=0)


def test_a_stream_that_runs_with_its_tokens_first_has_a_row_for_each_window_too(ids):
    """XLNet's blocks see [T, B, D]; what is not scored must be the same tokens as elsewhere."""
    shape = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 64}
    model = XLNetModel(XLNetConfig(**shape)).eval()
    scored = torch.arange(ids.shape[1]) < torch.tensor([[12], [5]])
    with measuring(model, proven(model)) as run:
        both, alone = run(ids, scored), [run(ids[i : i + 1], scored[i : i + 1]) for i in range(2)]
        whole = run(ids, None)
    assert both.tokens[:, 0].tolist() == [12, 5] and whole.tokens[:, 0].tolist() == [12, 12]
    torch.testing.assert_close(both.sums, torch.cat([rows.sums for rows in alone]))
