"""What a config.json describes: its config object, and whether the weights beside it are all that it asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, __version__

from dropformer.prune.errors import CheckpointError, shown
from dropformer.prune.loading.modeling import DropformerConfig, DropformerRemoteConfig


def config_from(fields: dict[str, Any]) -> PreTrainedConfig:
    """The config object that a config.json describes, pruned or stock.

    Raises CheckpointError for a model_type that only a checkpoint's own code knows.
    """
    from transformers import CONFIG_MAPPING

    fields = PreTrainedConfig._decode_special_floats(fields)  # JSON has no infinity; transformers writes it as a tag
    kind = fields.get("base_model_type") or fields["model_type"]
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"model_type {shown(kind)} is known to a checkpoint's own code and not to transformers {__version__}; "
            "read that code, then allow it by --trust-remote-code"
        )
    for own in (DropformerConfig, DropformerRemoteConfig):
        if fields["model_type"] == own.model_type:
            return own.from_dict(fields)
    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)


def check_whole(path: Path, info: dict[str, Any]) -> None:
    """Raises CheckpointError for transformers' loading info that names missing, unexpected or misfit tensors."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info.get(problem) or []))
        if found:
            what = problem.replace("_", " ")
            raise CheckpointError(
                f"{path} does not hold the model its config describes: {len(found)} {what}, the first {found[0]}; "
                "get a complete copy of the checkpoint"
            )
