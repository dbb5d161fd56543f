"""Pruned models in vLLM: its own class of the family, without the modules that the checkpoint's config drops.

`DropformerQwen3ForCausalLM` and every other twin is made when it is first asked for (PEP 562): a subclass of vLLM's
class that builds the dense model, then replaces each dropped module by `Zeros` or `PassNorm` and takes its entries
out of vLLM's forward context, so that no KV cache is allocated for it.  Weights load as in the base class, and a
parameter that is in no file stops it.  While it builds, the dense model is in memory once.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.transformers.base import Base as TransformersBackend
from vllm.model_executor.models.utils import PPMissingLayer

from dropformer.prune.engines.vllm import moved_windows, tried
from dropformer.prune.engines.vllm_plugin import PREFIX
from dropformer.prune.engines.vllm_windows import give_window
from dropformer.prune.loading.skipped_modules import replacement

# What vLLM calls a member of a block where transformers has another name for it.
ALIASES = {"mlp": ("block_sparse_moe", "feed_forward", "ffn", "moe"), "self_attn": ("attention", "attn")}

# Classes that load a bias of the head and never add it (0.32), the dense model's too.
HEAD_BIAS_LEFT_OUT = ("PhiMoEForCausalLM",)


class Zeros(nn.Module):
    """In place of a dropped attention or MLP: zeros like the hidden states, in as many values as `values`.

    Hidden states [..., D] -> [..., width or D].  A layer that writes into `output` gets zeros there.
    """

    def __init__(self, values: int, width: int | None = None) -> None:
        super().__init__()
        self.values, self.width = values, width

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(output := kwargs.get("output"), torch.Tensor):
            return output.zero_()
        hidden = hidden_states(args, kwargs)
        zeros = hidden.new_zeros(*hidden.shape[:-1], self.width or hidden.shape[-1])
        return zeros if self.values == 1 else (zeros, *[None] * (self.values - 1))


class PassNorm(nn.Module):
    """In place of a dropped branch's norm: the input, to which a residual stream is added where the norm adds one."""

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return hidden
        added = hidden + residual
        return added, added


def hidden_states(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among a module's inputs: named so, or the first tensor that is not of whole numbers."""
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        return kwargs["hidden_states"]
    values = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return next(value for value in values if value.is_floating_point())


def __getattr__(name: str) -> type[nn.Module]:
    """The twin of one of vLLM's classes."""
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    return twin(name)


@cache
def twin(name: str) -> type[nn.Module]:
    """The pruned subclass of the class that vLLM has for an architecture, under its name with `PREFIX`."""
    native: Any = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()

    class Pruned(native):  # type: ignore[misc, valid-type]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
            config = vllm_config.model_config.hf_config
            if why := tried()["wrong"].get(config.model_type):
                raise ValueError(f"vLLM does not give torch's results for pruned {config.model_type}: {why}")
            if why := moved_windows(config.to_dict(), config.model_type):
                raise ValueError(f"vLLM would not give torch's results for this {config.model_type}: {why}")
            ours, config.architectures = config.architectures, [name.removeprefix(PREFIX)]
            try:  # the transformers backend looks up by architecture how tensors were renamed
                super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            finally:
                config.architectures = ours
            drop_modules(self, getattr(config, "dropformer_modules", {}), vllm_config)
            self.quantized = vllm_config.model_config.quantization is not None

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
            loaded = super().load_weights(weights, *args, **kwargs)
            if loaded is not None and not self.quantized:
                stop_where_unfilled(self, loaded)
            return loaded

    if native.__name__ in HEAD_BIAS_LEFT_OUT:
        Pruned.compute_logits = with_head_bias
    Pruned.__name__ = Pruned.__qualname__ = name
    Pruned.__module__ = __name__
    return Pruned


def with_head_bias(model: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] of hidden states [N, D], the head's bias added."""
    return model.logits_processor(model.lm_head, hidden_states, model.lm_head.bias)


def stop_where_unfilled(model: nn.Module, loaded: set[str]) -> None:
    """Raise ValueError where the checkpoint filled none of a parameter: vLLM checks that of norms and embeddings alone.

    The linear layers of an unquantized model are exempt there, and compute with whatever their memory held.
    """
    if unfilled := sorted({name for name, _ in model.named_parameters()} - loaded):
        names = ", ".join(unfilled[:3]) + (f" and {len(unfilled) - 3} more" if len(unfilled) > 3 else "")
        raise ValueError(f"the checkpoint has no numbers for {names}, which vLLM's class of the family wants")


def drop_modules(model: nn.Module, modules: dict[str, Any], vllm_config: VllmConfig) -> None:
    """Replace the modules that a checkpoint's config names.  Raises ValueError for what vLLM's class cannot do."""
    dropped: list[nn.Module] = []
    for path, form in modules.items():
        windowed = isinstance(form, dict) and "window" in form
        if windowed and (why := unseen(form["window"][0], form["window"][1], "fold" in form)):
            raise ValueError(f"{path} attends to {why}; load the checkpoint in transformers")
        if isinstance(form, dict) and "agents" in form:
            raise ValueError(f"{path} attends through agents, which vLLM has no form for")
        found = find(model, path)
        if found is None:  # of another pipeline stage
            continue
        owner, name = found
        if windowed:
            give_window(getattr(owner, name), form["window"][0], vllm_config)
            continue
        old = getattr(owner, name)
        setattr(owner, name, standing_for(old, form, isinstance(model, TransformersBackend)))
        dropped += old.modules()
    forget(dropped, vllm_config)
    for parent in model.modules():
        without(parent, dropped)


def unseen(width: int, sinks: int, fold: bool = False) -> str:
    """What vLLM's attention cannot do of a window; empty where it can."""
    if fold:
        return f"its last {width} tokens and a constant from there on, and vLLM's sinks are constants from the start on"
    return f"its last {width} tokens and the first {sinks}, for which vLLM's attention has no form" if sinks else ""


def find(model: nn.Module, path: str) -> tuple[nn.Module, str] | None:
    """The owner and name, in vLLM's model, of a module of transformers' model; None if on another pipeline stage.

    Raises ValueError where vLLM's model has no such module.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapped = mapper.map_name(path + ".weight").removesuffix(".weight") if mapper else path
    owner: Any = model
    *parents, last = mapped.split(".")
    for part in parents:
        owner = getattr(owner, part, None)
        if isinstance(owner, PPMissingLayer):
            return None
    names = [name for name in (last, *ALIASES.get(last, ())) if isinstance(getattr(owner, name, None), nn.Module)]
    if not names:
        raise ValueError(f"{type(model).__name__}: vLLM's class has no module for {path}, which the checkpoint drops")
    return owner, names[0]


def standing_for(old: nn.Module, form: Any, transformers_backend: bool) -> nn.Module:
    """The module that takes the place of `old`.

    vLLM's transformers backend calls modules as transformers does, so the checkpoint's own form holds; vLLM's
    own blocks call norms with a residual stream, and some of their layers return a bias too.
    """
    if transformers_backend:
        return replacement(form)
    if isinstance(form, dict) and "linear" in form:
        raise ValueError("linear maps in place of attention are not carried over to vLLM; load it in transformers")
    if isinstance(old, LinearBase):
        return Zeros(2 if old.return_bias else 1, old.output_size_per_partition)
    if form == "input" or all(parameter.dim() < 2 for parameter in old.parameters()):
        return PassNorm()
    return Zeros(values_returned(type(old).forward))


def values_returned(forward: Callable[..., Any]) -> int:
    """How many values a forward returns, read from its `return` statements: `return output, bias` has two."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value]
    return max([len(value.elts) for value in returned if isinstance(value, ast.Tuple)], default=1)


def forget(dropped: list[nn.Module], vllm_config: VllmConfig) -> None:
    """Remove modules from vLLM's forward context, in which they would get KV cache or count as expert layers."""
    compilation = vllm_config.compilation_config
    context, ids = compilation.static_forward_context, set(map(id, dropped))
    for prefix in [prefix for prefix, module in context.items() if id(module) in ids]:
        del context[prefix]
        if prefix in compilation.static_all_moe_layers:
            compilation.static_all_moe_layers.remove(prefix)


def without(parent: nn.Module, dropped: list[nn.Module]) -> None:
    """Remove dropped modules from plain lists, in which MoE models keep their layers, so that they are freed."""
    ids = set(map(id, dropped))
    for key, value in list(vars(parent).items()):
        if isinstance(value, list) and any(id(item) in ids for item in value):
            setattr(parent, key, [item for item in value if id(item) not in ids])
