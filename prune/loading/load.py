"""Load a checkpoint, dense or pruned, and accept it only whole: nothing missing, nothing unexpected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from dropformer.prune.errors import CheckpointError, ModelError
from dropformer.prune.loading import modeling
from dropformer.prune.loading.deci_families import DECI
from dropformer.prune.loading.quiet import quiet_transformers

HEADS = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageTextToText",
    "AutoModelForImageClassification",
    "AutoModel",
)


def load(
    path: Path | str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in a checkpoint folder, as a subclass of its native class where layers are missing.

    `dtype` None means float32 on a CPU and the checkpoint's own elsewhere.  Tensors are read one by one onto their
    device, so host memory does not hold the model on its way to a GPU; on the device "meta" nothing is read, and
    names and shapes alone are checked.  Raises CheckpointError when tensors are missing, unexpected or of another
    shape: a model is never filled with random weights.
    """
    path = Path(path)
    device = usable_device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" and device_map is None else "auto"
    if device_map is None and device.type != "cpu":
        device_map = {"": device}
    place = {} if device_map is None else {"device_map": device_map}
    if _model_type(path) == DECI:
        from dropformer.prune.loading.deci import load_deci

        return load_deci(path, dtype, place)
    config = read_model_config(path, trust_remote_code)
    auto = auto_class(config)
    try:
        with quiet_transformers():
            model, info = auto.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **place
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {_first_line(error)}") from error
    check_whole(path, info)
    return model


def _model_type(path: Path) -> str | None:
    """What config.json says, where there is one that can be read."""
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None


def weightless(path: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint folder on the meta device, to ask it about names and shapes."""
    config = read_model_config(path, trust_remote_code)
    with quiet_transformers(), torch.device("meta"):
        return build(config, trust_remote_code=trust_remote_code)


def build(
    config: transformers.PreTrainedConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model with the head that its config names, without the weights of any checkpoint."""
    loader = auto_class(config)
    if hasattr(loader, "from_config"):
        return loader.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return loader._from_config(config, dtype=dtype)


def usable_device(name: torch.device | str | None) -> torch.device:
    """The named device; None is the first GPU, else the CPU.  Raises ModelError for one that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = _first_line(error)
        raise ModelError(f"device `{name}` cannot be used ({said}); expected cpu, cuda or cuda:N") from None
    return device


def read_model_config(path: Path, trust_remote_code: bool = False) -> transformers.PreTrainedConfig:
    """The config object of a checkpoint folder.  Raises CheckpointError for one that transformers cannot use."""
    if _model_type(path) == DECI:
        from dropformer.prune.loading.deci import dropformer_config
        from dropformer.prune.surgery.surgery import config_from

        return config_from(dropformer_config(json.loads((path / "config.json").read_text(encoding="utf-8"))))
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes validate in many ways, none of which is ours to list
        raise CheckpointError(
            f"{path / 'config.json'} is not a config that transformers can use: {_first_line(error)}"
        ) from error


def auto_class(config: transformers.PreTrainedConfig) -> Any:
    """What loads a config's model with the head it was saved with: an Auto class, else the named class itself."""
    base = getattr(type(config), "base_config_class", type(config))
    pruned = modeling.pruned_config_class(base)  # type: ignore[arg-type]  # registers with every Auto class
    architecture = (getattr(config, "architectures", None) or [""])[0].removeprefix("Dropformer")
    known = {name: auto._model_mapping[base] for name, auto in _autos().items() if base in auto._model_mapping}
    for name, native in known.items():
        if getattr(native, "__name__", "") == architecture:
            return getattr(transformers, name)
    native = getattr(transformers, architecture, None)
    if known and isinstance(native, type) and issubclass(native, PreTrainedModel) and native.config_class is base:
        return modeling.pruned_model_class(native, pruned) if isinstance(config, pruned) else native  # type: ignore[arg-type]
    if usual := next((name for name in HEADS if name in known), None):
        return getattr(transformers, usual)
    if hasattr(config, "auto_map"):
        return transformers.AutoModelForCausalLM
    raise ModelError(f"transformers has no model for configs of type {config.model_type}")


def _autos() -> dict[str, Any]:
    """Every Auto class of models by name, the usual heads first."""
    names = [*HEADS, *(name for name in vars(modeling_auto) if name.startswith("AutoModel") and name not in HEADS)]
    return {name: getattr(modeling_auto, name) for name in names}


def check_whole(path: Path, info: dict[str, Any]) -> None:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info.get(problem) or []))
        if found:
            what = problem.replace("_", " ")
            raise CheckpointError(
                f"{path} does not hold the model its config describes: {len(found)} {what}, the first {found[0]}; "
                "get a complete copy of the checkpoint"
            )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
