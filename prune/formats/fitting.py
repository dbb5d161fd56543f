"""Does a config.json still describe the weights and the plan?  Asked before anything is written by files alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dropformer.prune.errors import CheckpointError, PlanError, reason
from dropformer.prune.files import Checkpoint
from dropformer.prune.files.config_json import read_config
from dropformer.prune.files.strict_json import read_object
from dropformer.prune.plan import Plan
from dropformer.prune.surgery.config import stated_counts

DTYPES = ("float32", "bfloat16", "float16", "auto")
OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate")
NOTES = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache")  # fields that build nothing


def config_digest(config: Mapping[str, Any]) -> str:
    """A short hash of what a config builds."""
    fields = {key: value for key, value in config.items() if not (key in NOTES and _harmless(key, value))}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _harmless(key: str, value: Any) -> bool:
    if key.endswith("dtype"):
        return value in (None, *DTYPES)
    return isinstance(value, bool if key == "use_cache" else str)


def check_fits(plan: Plan, source: Checkpoint, trust_remote_code: bool = False) -> None:
    """Raises PlanError or CheckpointError where config.json describes another model than the plan or the tensors.

    A config that is the one that was planned with is known to build the model; any other is built by transformers,
    without weights, and compared: blocks with the plan's outline, parameters with the tensors' shapes.
    """
    config = read_config(source.folder)
    _check_generation(source.folder)
    if plan.model.model_type not in (None, config["model_type"]):
        raise PlanError(
            f"the plan was made for a {plan.model.model_type}, and {source.folder} is a {config['model_type']}; plan "
            "this model"
        )
    for stack in plan.outline.stacks:
        for key, value in stated_counts(config, stack).items():
            if value != stack.blocks:
                raise CheckpointError(
                    f"{source.folder / 'config.json'}: {key} is {value}, but the plan has {stack.blocks} blocks "
                    f"in {stack.path}; get the model's own config.json"
                )
    if plan.model.config != config_digest(config):
        _check_built(plan, source, trust_remote_code)


def _check_generation(folder: Path) -> None:
    """Raises CheckpointError for a generation_config.json that transformers refuses; token ids need no asking."""
    path = folder / "generation_config.json"
    if not path.exists():
        return
    if all(_usual(key, value) for key, value in read_object(path).items()):
        return
    from transformers import GenerationConfig  # not torch's part of it: a second or two

    from dropformer.prune.loading.quiet import quiet_transformers

    try:
        with quiet_transformers():
            GenerationConfig.from_pretrained(folder)
    except Exception as error:  # validators of many kinds
        raise CheckpointError(f"{path} is not one that transformers can use: {reason(error)}") from None


def _usual(key: str, value: Any) -> bool:
    """Is this field of generation_config.json one that any version takes?"""
    if key == "transformers_version":
        return isinstance(value, str)
    if key.endswith("_token_id"):
        ids = value if isinstance(value, list) else [value]
        return all(type(token) is int and token >= 0 for token in ids)
    if key in ("temperature", "top_p"):
        return type(value) in (int, float) and 0 < value <= 1
    if key in ("max_length", "top_k"):
        return type(value) is int and 0 < value < 1 << 30
    return isinstance(value, bool) and key in ("do_sample", "use_cache", "_from_model_config", *OUTPUTS)


def _check_built(plan: Plan, source: Checkpoint, trust_remote_code: bool) -> None:
    """Raises CheckpointError unless the config builds the plan's blocks, and just the tensors of the files."""
    from dropformer.prune.loading.load import load

    where = source.folder / "config.json"
    try:
        model = load(source.folder, device="meta", trust_remote_code=trust_remote_code)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a config makes go wrong as its model is built
        raise CheckpointError(f"{where} builds no model: {reason(error)}") from None
    for stack in plan.outline.stacks:
        built = dict(model.named_modules()).get(stack.path)
        if built is None or len(list(built.children())) != stack.blocks:
            raise CheckpointError(f"{where} does not build the {stack.blocks} blocks of {stack.path} that the plan has")
