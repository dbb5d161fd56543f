"""What agents take from each attention layer of an encoder: the ranking behind `agent:N@A`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.metrics.analysis.analyze import as_inputs
from dropformer.metrics.analysis.window_loss import first_output, noting
from dropformer.prune.architecture import Layer
from dropformer.prune.block_map import attention_module
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.loading.agent_attention import NoAgents, unfit
from dropformer.prune.outline import Outline
from dropformer.prune.rungs.agent import Agents
from dropformer.prune.surgery.rungs import agent_twin


def agent_losses(
    model: nn.Module, outline: Outline, batches: Iterable[Mapping[str, Tensor]], agents: Agents, stack: str = ""
) -> dict[Layer, float]:
    """Mean over real tokens of |A_n(x) - A(x)|^2 / |x|^2, for each attention layer that takes agents.

    A and A_n are what the layer adds to the residual stream without and with agents, on the dense model's own stream
    x.  Batches: model inputs; tokens that their attention mask [B, T] names as padding do not count.  Time: one
    forward pass, with each attention twice.  Raises ArchitectureError where no layer takes agents, with the reasons.
    """
    sums: dict[Layer, Tensor] = {}
    real: list[Tensor | None] = []
    part = outline.stack(stack)
    reasons = [why for i in range(part.blocks) if (why := part.block(i).kept.get("attn"))]
    with torch.inference_mode(), ExitStack() as hooks:
        for layer in outline.layers("attn", stack):
            block = model.get_submodule(f"{outline.stack(stack).path}.{layer.index}")
            name = attention_module(outline, layer)
            module = block.get_submodule(name)
            if why := unfit(module):
                reasons.append(why)
                continue
            entered: list[Tensor] = []
            compare = _compare(agent_twin(module, agents.count), _writer(block, outline, layer, name), entered, real)
            hooks.callback(block.register_forward_pre_hook(noting(entered), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(_adding(compare, layer, sums), with_kwargs=True).remove)
        counted = _read(model, batches, real)
    if not sums:
        raise ArchitectureError(f"no attention layer takes agents: {(reasons or ['there is none'])[0]}")
    return {layer: float(total) / counted for layer, total in sums.items()}


def _read(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], real: list[Tensor | None]) -> int:
    """Run the model on the batches; how many samples they have."""
    counted = 0
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            real[:] = [mask.bool() if mask is not None else None]
            counted += len(next(iter(batch.values())))
            model(**as_inputs(model, batch))
    except NoAgents as error:
        raise ArchitectureError(f"{error}; name the layers that can take agents, or drop layers instead") from None
    return counted


def _writer(block: nn.Module, outline: Outline, layer: Layer, name: str) -> nn.Module:
    """What turns the output of the attending module into what is added to the stream: BERT's `attention.output.dense`.

    The identity where that module does so itself.
    """
    forms = outline.branch(layer).modules
    behind = [path for path, form in forms.items() if path != name and str(form).startswith("zeros")]
    return block.get_submodule(behind[0]) if behind else nn.Identity()


def _compare(twin: nn.Module, writer: nn.Module, entered: list[Tensor], real: list[Tensor | None]) -> Any:
    """Inputs and output of an attention -> the mean over each sample's real tokens, summed over samples."""

    def compare(args: tuple, kwargs: dict, output: Any) -> Tensor:
        full, less = (writer(first_output(each)).float() for each in (output, twin(*args, **kwargs)))
        size = entered[0].to(full.device).float().square().sum(-1).clamp_min(1e-12)
        lost = (less - full).square().sum(-1) / size
        mask = real[0]
        weights = torch.ones_like(lost) if mask is None or mask.shape != lost.shape else mask.to(lost)
        return ((lost * weights).sum(-1) / weights.sum(-1).clamp_min(1)).sum(dtype=torch.float64)

    return compare


def _adding(compare: Any, layer: Layer, sums: dict[Layer, Tensor]) -> Any:
    def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        total = compare(args, kwargs, output)
        sums[layer] = sums[layer] + total if layer in sums else total

    return hook
