"""The export format `executorch`: params.json and model.pth for the Llama model of ExecuTorch's exporter.

    python -m executorch.extension.llm.export.export_llm base.params=OUT/params.json base.checkpoint=OUT/model.pth ...

That model (executorch/examples/models/llama) builds no attention where `layer_types` says "skip_attention".  In 1.5.1
it builds an MLP in every block, whatever `mlp_type` says: a dropped MLP is written as zeros, and as "skip" for a
release that reads it.  Everything else that a family needs and the exporter would ignore is refused here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropformer.prune.errors import ArchitectureError, OutputError, PlanError, VerificationError
from dropformer.prune.files import CopyReport
from dropformer.prune.formats.registry import ExportFacts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dropformer.prune.block_map import Surgery
    from dropformer.prune.formats.writing import ExportJob

PARAMS, FILE = "params.json", "model.pth"
FAMILIES = {"llama": {}, "mistral": {}, "qwen2": {"attention_qkv_bias": True}, "qwen3": {"use_qk_norm": True}}
LEAVES = {  # of a block: transformers' names, and ExecuTorch's
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "self_attn.q_norm.weight": "attention.q_norm_fn.weight",
    "self_attn.k_norm.weight": "attention.k_norm_fn.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}
OUTSIDE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def check_family(config: Mapping[str, Any]) -> None:
    """Raises ArchitectureError for a family that ExecuTorch's Llama model does not compute."""
    if config["model_type"] not in FAMILIES:
        raise ArchitectureError(
            f"a model of type {config['model_type']} is not computed by ExecuTorch's Llama model; it takes "
            f"{', '.join(FAMILIES)}: leave out --format executorch"
        )


def check(facts: ExportFacts) -> None:
    """Raises ArchitectureError, before the model is opened, for a family that ExecuTorch's Llama model is not."""
    if facts.config:
        check_family(facts.config)


def params_of(config: Any, surgery: Surgery) -> dict[str, Any]:
    """params.json for the config object of the dense model.  Raises ArchitectureError for what would be ignored."""
    check_family({"model_type": config.model_type})
    if "sliding_attention" in (getattr(config, "layer_types", None) or []) or (
        config.model_type == "mistral" and config.sliding_window
    ):
        raise ArchitectureError("ExecuTorch's Llama model has no sliding window: leave out --format executorch")
    if config.hidden_act not in ("silu", "swish"):
        raise ArchitectureError(f"ExecuTorch's MLPs use silu, this model {config.hidden_act}: choose another format")
    blocks = surgery.block_map.stacks[""]
    heads = config.num_attention_heads
    params = {
        "dim": config.hidden_size,
        "n_layers": len(blocks),
        "n_heads": heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden_dim": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        **FAMILIES[config.model_type],
        **({"qk_norm_before_rope": True} if "use_qk_norm" in FAMILIES[config.model_type] else {}),
        **_rope(config),
    }
    if getattr(config, "attention_bias", False):
        raise ArchitectureError("ExecuTorch's Llama model has no bias behind attention: leave out --format executorch")
    if any("attn" in block.skipped for block in blocks):
        kinds = ["skip_attention" if "attn" in block.skipped else "full_attention" for block in blocks]
        params["layer_types"] = kinds
    if any("mlp" in block.skipped for block in blocks):
        params["mlp_type"] = ["skip" if "mlp" in block.skipped else "default" for block in blocks]
    return params


def _rope(config: Any) -> dict[str, Any]:
    """Rotary settings.  Every scaling that holds at all lengths is given as the factors that divide frequencies.

    transformers' frequencies f_j and the plain ones p_j = theta^(-2j/D): the factor is p_j / f_j, for Llama 3.1's
    longest wavelengths 8.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    found = {"use_hf_rope": True, "rope_theta": rope["rope_theta"]}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ArchitectureError(
            "partial rotary embeddings are not carried to ExecuTorch: leave out --format executorch"
        )
    if kind == "default":
        return found
    if kind not in ("linear", "llama3", "yarn"):
        raise ArchitectureError(f"rotary scaling of type {kind} depends on the length, which ExecuTorch's does not")
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    width = 2 * len(frequencies)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    factors = (plain / frequencies.double()).tolist()
    return found | {"rope_scaling_short_factor": factors, "rope_scaling_attention_factor": float(scale)}


def state_of(model: Any, params: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The pruned model's parameters under ExecuTorch's names, with zeros for dropped MLPs.

    Raises ArchitectureError for a parameter that its Llama model has no place for.
    """
    import torch

    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        found[_renamed(name)] = tensor.detach().to("cpu", dtype)
    found.setdefault("output.weight", found["tok_embeddings.weight"])
    if "mlp_type" in params:
        down = torch.zeros(params["dim"], params["hidden_dim"], dtype=dtype)  # one storage for all, in the file too
        zeros = {"w1": down.view(down.shape[::-1]), "w2": down, "w3": down.view(down.shape[::-1])}
        for block in (i for i, kind in enumerate(params["mlp_type"]) if kind == "skip"):
            found[f"layers.{block}.ffn_norm.weight"] = torch.ones(params["dim"], dtype=dtype)
            found |= {f"layers.{block}.feed_forward.{name}.weight": tensor for name, tensor in zeros.items()}
    return found


def _renamed(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        block, leaf = match.groups()
        for old in (leaf, leaf.rpartition(".")[0]):
            if old in LEAVES:
                return f"layers.{block}.{LEAVES[old]}{leaf.removeprefix(old)}"
    raise ArchitectureError(f"ExecuTorch's Llama model has no place for {name}: leave out --format executorch")


def write(job: ExportJob, folder: Path) -> CopyReport:
    """Write params.json and model.pth, of the type that the source has, and compare the file with the model.

    Memory: the parameters once more where the model computes in another type.  Raises ArchitectureError and PlanError
    for what ExecuTorch's model cannot carry, VerificationError where the file reads back differently.
    """
    if job.model is None:
        raise OutputError("--format executorch needs the model in memory; use --format dropformer")
    if job.block_map.mapped:
        raise PlanError("ExecuTorch's Llama model has no linear map in place of attention; repair another way")
    import torch

    from dropformer.prune.loading.described import config_from
    from dropformer.prune.surgery.stored_tensors import stored_dtype

    params = params_of(config_from(dict(job.config)), job.surgery)
    state = state_of(job.model, params, stored_dtype(job.source.folder))
    (folder / PARAMS).write_text(json.dumps(params, indent=1) + "\n", encoding="utf-8")
    torch.save(state, folder / FILE)
    _compare(state, folder / FILE)
    size = sum({tensor.data_ptr(): tensor.nbytes for tensor in state.values()}.values())
    notes = ("dropped MLPs are zeros: ExecuTorch 1.5.1 computes one in every block",) if "mlp_type" in params else ()
    dropped = max(0, len(job.names) - len(state))
    return CopyReport(len(state), dropped, size, max(0, job.source.nbytes - size), notes=notes)


def _compare(state: Mapping[str, Tensor], path: Path) -> None:
    import torch

    written = torch.load(path, mmap=True, weights_only=True)
    for name, tensor in state.items():
        if name not in written or not torch.equal(written[name], tensor):
            raise VerificationError(f"{name} in {path.name} differs from the model's; nothing was kept")
