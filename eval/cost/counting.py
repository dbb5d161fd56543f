"""Count a decoder's cost from its outline and config: a loaded model's, or a config's without building weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from dropformer.eval.cost.memory import parameter_count
from dropformer.eval.cost.model_cost import BlockCost, Experts, ModelCost
from dropformer.metrics.calibration.settings import context_of
from dropformer.prune.architecture import Layer
from dropformer.prune.discovery.weightless import outline_without_weights
from dropformer.prune.errors import ArchitectureError, ModelError, reason
from dropformer.prune.loading.load import auto_class
from dropformer.prune.loading.parts import text_config, windows_of
from dropformer.prune.loading.skipped_modules import hidden_states
from dropformer.prune.outline import Outline, StackOutline
from dropformer.prune.samples.inputs import longest_text, sample_inputs, takes_pictures, writes_text
from dropformer.prune.window import Window

EXPERTS_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def cost_of_config(config: PreTrainedConfig | Mapping[str, Any]) -> ModelCost:
    """The cost of the causal language model or the encoder that a config describes, built on the meta device.

    Raises ModelError for a config of another kind (an encoder-decoder, several stacks), ArchitectureError if no layer
    can be dropped, or if the forward pass depends on tensor values, which the meta device lacks (DBRX's experts).
    """
    try:
        if isinstance(config, Mapping):
            config = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=torch.bfloat16).eval()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
        said = reason(error, 160)
        raise ModelError(f"the config builds no model ({said}); expected a decoder's or an encoder's") from error
    if writes_text(model):
        return _counted(model)
    found = _counted(model, encoder=True)
    if len(found.outline.stacks) > 1 or model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} is neither a causal language model nor an encoder of one stack; expected one"
        )
    return replace(found, tokens=_own_tokens(model, found.outline))


def _own_tokens(model: nn.Module, outline: Outline) -> int:
    """Tokens of an image of the size that a vision model was made for, or of the longest text of a text encoder."""
    if not takes_pictures(model):
        return longest_text(model) or context_of(model.config) or 512
    found: list[int] = []
    block = model.get_submodule(f"{outline.stacks[0].path}.0")
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(hidden_states(args, kwargs).shape[1]), with_kwargs=True
    )
    try:
        model(**sample_inputs(model, batch=1))
    finally:
        hook.remove()
    return found[0]


def cost_of(model: nn.Module) -> ModelCost:
    """The cost of a decoder, dense or pruned, with the attention windows of its plan.

    Its structure is traced on a copy without weights, so that nothing is computed.  If its config does not describe
    it fully, or its forward pass depends on tensor values, the model itself is traced.  Raises ArchitectureError if
    no layer can be dropped.
    """
    found: ModelCost | None = None
    with suppress(ArchitectureError):
        if (twin := _twin(model)) is not None:
            found = _counted(twin)
    found = found or _counted(model)
    return found.windowed(_windows(model, found.outline))


def _windows(model: nn.Module, outline: Outline) -> dict[Layer, Window]:
    """The attention windows of a model's plan, by current layer index."""
    paths = {f"{stack.path}.": stack.name for stack in outline.stacks if stack.name in ("", "decoder")}
    found = {}
    for name, window in windows_of(model).items():
        path = next((path for path in paths if name.startswith(path)), None)
        if path:
            index = int(name.removeprefix(path).partition(".")[0])
            found[Layer("attn", index, paths[path])] = Window(window.width, window.sinks)
    return found


def _twin(model: nn.Module) -> nn.Module | None:
    """The same model on the meta device; None if its config does not build the same parameters."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config)).eval()
    except Exception:  # whatever the model's own code raises
        return None
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (model, twin)]
    return twin if shapes[0] == shapes[1] else None


def _counted(model: nn.Module, encoder: bool = False) -> ModelCost:
    outline = outline_without_weights(model)
    stack = next((s for s in outline.stacks if s.name in ("", "decoder")), outline.stacks[0])
    config = text_config(model)
    modules = model.get_submodule(stack.path).children()
    experts = [_experts(block, config) for block in modules]
    blocks = tuple(_block(config, stack, index, found, encoder) for index, found in enumerate(experts))
    head, lookup = _head_and_lookup(model)
    inside = sum(block.attention + block.mlp + block.shared for block in blocks)
    hidden = getattr(config, "hidden_size", 0) or 0
    return ModelCost(blocks, head, lookup, outline.parameters - inside - head - lookup, outline, hidden=hidden)


def _block(config: Any, stack: StackOutline, index: int, experts: Experts | None, encoder: bool) -> BlockCost:
    owned = {branch.kind: branch for branch in stack.of_block(index)}
    own = {kind: branch.parameters for kind, branch in owned.items()}
    attention, mlp = own.pop("attn", 0), own.pop("mlp", 0)
    shared = stack.block(index).parameters + sum(own.values())
    experts = experts if mlp else None
    layer = _layer_config(config, index)
    heads = getattr(layer, "num_attention_heads", 0)
    if not attention or not heads or not (encoder or _reads_keys(config, stack, index)):
        return BlockCost(attention, mlp, shared, experts=experts)
    size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    key_size = getattr(layer, "qk_head_dim", None) or size
    value_size = getattr(layer, "v_head_dim", None) or size
    return BlockCost(
        attention,
        mlp,
        shared,
        width=stack.caches * heads * (key_size + value_size) // 2,
        kv=owned["attn"].kv,
        heads=stack.caches * heads,
        groups=heads // (getattr(layer, "num_key_value_heads", None) or heads),
        window=_window(config, index),
        experts=experts,
    )


def _reads_keys(config: Any, stack: StackOutline, index: int) -> bool:
    """Whether the block attends over keys, its own or an earlier block's; a state-space mixer does not."""
    branch = stack.branch("attn", index)
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    return branch is not None and (branch.kv > 0 or index >= stack.blocks - shared)


def _layer_config(config: Any, index: int) -> Any:
    """The config of one layer, where layers differ (Gemma 4)."""
    layers = getattr(config, "per_layer_config", None)
    return layers[index] if layers is not None and index < len(layers) else config


def _window(config: Any, index: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None)
    if index < len(kinds) and "sliding" in kinds[index]:
        return getattr(config, "sliding_window", None)
    if index < len(kinds) and "chunked" in kinds[index]:
        return getattr(config, "attention_chunk_size", None)
    return None


def _experts(block: nn.Module, config: Any) -> Experts | None:
    used = next((getattr(config, name) for name in EXPERTS_USED if getattr(config, name, None)), None)
    experts = next((module for name, module in block.named_modules() if name.endswith("experts")), None)
    if experts is None or not used or not parameter_count(experts):
        return None
    count = len(experts) if isinstance(experts, nn.ModuleList) else int(next(experts.parameters()).shape[0])
    return Experts(count, int(used), parameter_count(experts) // count)


def _head_and_lookup(model: Any) -> tuple[int, int]:
    """Parameters of the output head, and of embedding tables not tied to it."""
    head = model.get_output_embeddings()
    multiplied = {id(p): p.numel() for p in head.parameters()} if head is not None else {}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    looked_up = {id(table.weight): table.weight.numel() for table in tables if id(table.weight) not in multiplied}
    return sum(multiplied.values()), sum(looked_up.values())
