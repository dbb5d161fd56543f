"""Blocks and branches are found in families that no table names, and dropping them is what zeroed weights are."""

import copy
import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from dropformer.prune.architecture import Architecture
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.proof import prove
from dropformer.prune.discovery.replay import skipped
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.samples.inputs import sample_inputs

# family -> (its config, parameters that end the attention branches, those that end the MLP branches)
O_PROJ, DOWN_PROJ = r"\.o_proj\.", r"\.down_proj"
FAMILIES: dict[str, tuple[dict, str, str]] = {
    "llama": ({}, O_PROJ, DOWN_PROJ),
    "mistral": ({"sliding_window": 4}, O_PROJ, DOWN_PROJ),
    "mixtral": ({"num_local_experts": 4}, O_PROJ, DOWN_PROJ),
    "qwen2": ({}, O_PROJ, DOWN_PROJ),
    "qwen3": ({"head_dim": 8}, O_PROJ, DOWN_PROJ),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, O_PROJ, DOWN_PROJ),
    "gemma2": ({"head_dim": 8}, O_PROJ, DOWN_PROJ),
    "gemma3_text": ({"head_dim": 8, "sliding_window": 4}, O_PROJ, DOWN_PROJ),
    "phi3": ({}, O_PROJ, DOWN_PROJ),
    "phi": ({}, r"self_attn\.dense", r"mlp\.fc2"),
    "falcon": ({}, r"self_attention\.dense", r"dense_4h_to_h"),
    "gpt2": ({}, r"attn\.c_proj", r"mlp\.c_proj"),
    "gpt_neox": ({}, r"attention\.dense", r"dense_4h_to_h"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, r"out_proj", r"\.fc2\."),
    "bloom": ({"n_layer": 4}, r"self_attention\.dense", r"dense_4h_to_h"),
    "olmo2": ({}, O_PROJ, DOWN_PROJ),
    "cohere": ({}, O_PROJ, DOWN_PROJ),
    "deepseek_v3": (
        {
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        O_PROJ,
        DOWN_PROJ,
    ),
    "minimax": ({"head_dim": 8, "num_local_experts": 4, "mlp_beta_factor": 0.7}, r"\.(o|out)_proj\.", DOWN_PROJ),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4}, r"\.(o|out)_proj\.", DOWN_PROJ),
    "mamba": ({}, r"mixer\.out_proj", r"^$"),
}
PARALLEL = {"phi", "falcon", "gpt_neox", "cohere"}


def build(family: str, **changes) -> nn.Module:
    """A tiny random model whose biases and norms are random too, so that forgetting one shows."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(shape | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def found():
    """Each family's model and proven architecture, made once."""
    made: dict[str, tuple[nn.Module, Architecture]] = {}

    def get(family: str) -> tuple[nn.Module, Architecture]:
        if family not in made:
            model = build(family, **FAMILIES[family][0])
            architecture = discover(model)
            prove(model, architecture)
            made[family] = model, architecture
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_its_attention_and_its_mlp(found, family):
    _, architecture = found(family)
    (stack,) = architecture.stacks
    kinds = ["attn"] if family == "mamba" else ["attn", "mlp"]
    assert stack.name == ""
    assert [[branch.kind for branch in block.branches] for block in stack.blocks] == [kinds] * len(stack.blocks)
    assert not any(block.kept for block in stack.blocks)
    assert {block.parallel for block in stack.blocks} == {family in PARALLEL}


@pytest.mark.parametrize("kind", ["attn", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_a_branch_is_the_same_as_zeroing_its_output_projection(found, family, kind):
    model, architecture = found(family)
    block = architecture.stacks[0].blocks[1]
    branch = block.branch(kind)
    if branch is None:
        pytest.skip("no such branch")
    zeroed = copy.deepcopy(model)
    ends = re.compile(FAMILIES[family][1 if kind == "attn" else 2])
    with torch.no_grad():
        hit = [p.zero_() for name, p in zeroed.get_submodule(block.path).named_parameters() if ends.search("." + name)]
        want = zeroed(**sample_inputs(model)).logits
        with skipped(model, block.path, branch.modules):
            got = model(**sample_inputs(model)).logits
        dense = model(**sample_inputs(model)).logits
    assert hit
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert not torch.allclose(dense, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2", "phi", "falcon", "gpt2", "bloom", "deepseek_v3"])
def test_a_dropped_branch_takes_all_its_parameters_and_no_others(found, family):
    model, architecture = found(family)
    block = architecture.stacks[0].blocks[1]
    owned = {
        kind: {name for module in block.branch(kind).modules for name, _ in _parameters(model, block.path, module)}
        for kind in ("attn", "mlp")
    }
    assert not owned["attn"] & owned["mlp"]
    rest = {name for name, _ in model.get_submodule(block.path).named_parameters()} - owned["attn"] - owned["mlp"]
    shared = {"phi": "input_layernorm", "falcon": "input_layernorm"}.get(family, "nothing")
    assert all(name.startswith(shared) for name in rest)


def _parameters(model, block, module):
    for name, parameter in model.get_submodule(f"{block}.{module}").named_parameters():
        yield f"{module}.{name}", parameter


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon", "opt", "deepseek_v3", "minimax", "jamba"])
def test_a_model_without_weights_has_the_same_architecture(found, family):
    model, architecture = found(family)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(model.config)
    assert discover(meta) == architecture


def test_an_attention_whose_name_tells_nothing_is_one_without_weights_too(tiny):
    """Nemotron-H calls every layer `mixer`; without weights, operations alone tell attention from an MLP."""
    model = tiny("nemotron_h", layers_block_type=["full_attention", "linear_attention", "moe", "full_attention"])
    kinds = [str(layer) for layer in discover(model).layers() if layer.kind != "block"]
    assert kinds == [str(layer) for layer in discover(model.to("meta")).layers() if layer.kind != "block"]
    assert kinds == ["attn:0", "attn:1", "mlp:2", "attn:3"]


def test_inference_mode_changes_nothing(found):
    for family in ("gemma3_text", "jamba"):
        model, architecture = found(family)
        with torch.inference_mode():
            assert discover(model) == architecture


def test_a_mixture_without_weights_is_discovered_in_bfloat16(found):
    model, architecture = found("mixtral")
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    assert discover(meta) == architecture


def test_discovery_leaves_the_model_as_it_was(found):
    model = build("llama")
    model.train()
    model.model.layers[1].eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    prove(model, discover(model))
    assert model.training and not model.model.layers[1].training and model.model.layers[2].training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_whole_block_is_replaced_by_its_own_input(found):
    for family in ("llama", "gpt2", "bloom", "falcon"):
        model, architecture = found(family)
        block = architecture.stacks[0].blocks[1]
        assert block.plain
        with torch.no_grad():
            with skipped(model, block.path.rpartition(".")[0], {"1": block.form}):
                got = model(**sample_inputs(model)).logits
            both = block.branch("attn").modules | block.branch("mlp").modules
            with skipped(model, block.path, both):
                want = model(**sample_inputs(model)).logits
        torch.testing.assert_close(got, want, rtol=0, atol=0)


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "deberta-v2", "longformer"])
def test_encoders_keep_their_norms_and_lose_their_branches(family):
    extra = {"embedding_size": 32} if family == "electra" else {}
    extra |= {"attention_window": [4] * 3} if family == "longformer" else {}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **SMALL, **extra)).eval()
    architecture = discover(model)
    prove(model, architecture)
    for block in architecture.stacks[0].blocks:
        assert [branch.kind for branch in block.branches] == ["attn", "mlp"]
        assert not block.plain
        gone = {name for branch in block.branches for name in branch.modules}
        assert not any("LayerNorm" in name for name in gone)
        assert "attention.output.dense" in gone and "output.dense" in gone


def test_an_encoder_decoder_has_two_named_stacks_and_cross_attention():
    config = AutoConfig.for_model(
        "bart", d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64,
        encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=1, eos_token_id=2, bos_token_id=0,
        decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    architecture = discover(model)
    prove(model, architecture)
    assert [stack.name for stack in architecture.stacks] == ["encoder", "decoder"]
    assert [b.kind for b in architecture.stack("encoder").blocks[0].branches] == ["attn", "mlp"]
    assert [b.kind for b in architecture.stack("decoder").blocks[2].branches] == ["attn", "cross", "mlp"]
    assert "encoder.attn:1" in map(str, architecture.layers())
    assert "decoder.cross:2" in map(str, architecture.layers())


def test_the_first_attention_of_t5_stays_because_later_blocks_read_its_position_bias():
    config = AutoConfig.for_model("t5", d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, vocab_size=64)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    architecture = discover(model)
    prove(model, architecture)
    first = architecture.stack("encoder").blocks[0]
    assert "block.1" in first.kept["attn"]
    names = [str(layer) for layer in architecture.layers()]
    assert "encoder.attn:0" not in names and "encoder.block:0" not in names
    assert {"encoder.mlp:0", "encoder.attn:1", "encoder.block:1"} <= set(names)


def test_weights_that_all_blocks_share_cannot_be_dropped():
    config = AutoConfig.for_model("albert", embedding_size=16, **SMALL)
    with pytest.raises(ArchitectureError, match="3 times a pass with the same weights"):
        discover(AutoModelForMaskedLM.from_config(config))


def test_a_stream_of_several_copies_is_refused():
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "laurel_rank": 4, "hidden_size_per_layer_input": 8}
    sizes |= {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64}
    config = AutoConfig.for_model("gemma3n_text", layer_types=["full_attention"] * 3, **SMALL, **sizes)
    with pytest.raises(ArchitectureError, match="several streams side by side"):
        discover(AutoModelForCausalLM.from_config(config))


def test_a_forward_pass_that_rebuilds_the_model_is_refused():
    class Restless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))

        def forward(self, x):
            self.layers[0].linear1 = torch.nn.Linear(8, 16)
            return self.layers[1](self.layers[0](x))

    with pytest.raises(ArchitectureError, match=r"replaces layers.0.linear1 at every forward pass"):
        discover(Restless(), {"x": torch.randn(4, 2, 8)})


def test_images_calibrate_vision_models():
    config = AutoConfig.for_model("vit", image_size=16, patch_size=4, **{k: SMALL[k] for k in list(SMALL)[:4]})
    model = AutoModel.from_config(config).eval()
    architecture = discover(model)
    prove(model, architecture)
    assert [[b.kind for b in block.branches] for block in architecture.stacks[0].blocks] == [["attn", "mlp"]] * 3


def test_the_language_stack_of_a_multimodal_model_is_found_and_its_vision_tower_left_alone():
    text = {"model_type": "llama", "num_key_value_heads": 2, **SMALL}
    shape = {k: SMALL[k] for k in list(SMALL)[:4]}
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **shape}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_id=3)
    model = AutoModel.from_config(config).eval()
    architecture = discover(model)
    prove(model, architecture)
    assert [(stack.name, stack.path) for stack in architecture.stacks] == [("", "language_model.layers")]


def test_weights_of_two_types_are_told_which_dtype_computes(tiny):
    model = tiny("llama")
    model.model.layers[0].mlp.to(torch.bfloat16)
    with pytest.raises(ArchitectureError, match="--dtype auto"):
        discover(model)
