"""Load a checkpoint, dense or pruned, and accept it only whole: nothing missing, nothing unexpected."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from dropformer.prune.errors import CheckpointError, DropformerError, ModelError, reason, shown
from dropformer.prune.files import open_checkpoint
from dropformer.prune.files.config_json import read_config
from dropformer.prune.loading import modeling
from dropformer.prune.loading.deci.families import is_own_deci
from dropformer.prune.loading.described import check_whole, config_from, predicting_blocks
from dropformer.prune.loading.own_code import REMOTE_TYPE, learn_own_code, needs_own_code
from dropformer.prune.loading.quiet import quiet_transformers

HEADS = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageTextToText",
    "AutoModelForImageClassification",
    "AutoModel",
)
OWN_CODE = "comes with code of its own, which runs only with --trust-remote-code; read it first"
SIZE_RATIO, SIZE_SLACK = 2.5, 1 << 27  # tied weights count twice, masks of learned positions not at all


def load(
    path: Path | str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in a checkpoint folder, as a subclass of its native class where layers are missing.

    `dtype` None means `default_dtype`.  Tensors are read one by one onto their device, so host memory does not hold
    the model on its way to a GPU; on the device "meta" nothing is read, and names and shapes alone are checked.
    Raises CheckpointError when tensors are missing, unexpected or of another
    shape: a model is never filled with random weights.
    """
    path = Path(path)
    device = usable_device(device)
    fields = read_config(path)
    if dtype is None:
        dtype = default_dtype(fields, device.type == "cpu" and device_map is None)
    if device_map is None and device.type != "cpu":
        device_map = {"": device}
    place = {} if device_map is None else {"device_map": device_map}
    if is_own_deci(fields):
        from dropformer.prune.loading.deci.load import load_deci

        return load_deci(path, dtype, place)
    config = read_model_config(path, trust_remote_code)
    auto = auto_class(config)
    check_size(path, fields, config, trust_remote_code)
    known = {"config": config} if fields["model_type"] == REMOTE_TYPE else {}  # else the folder's copy of our code runs
    with one_line_errors(path), quiet_transformers():
        model, info = auto.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_whole` refuses them by name
            **place,
            **known,
        )
    check_whole(path, info, predicting_blocks(config))
    return model


def default_dtype(fields: Mapping[str, Any], on_cpu: bool) -> torch.dtype | str:
    """The dtype of a model where none is given: float32 on a CPU, the checkpoint's own dtype elsewhere.

    Quantized weights are computed with in the checkpoint's own dtype on a CPU too: their layers do not cast.
    """
    quantized = isinstance(fields.get("quantization_config"), dict)
    if not quantized:
        return torch.float32 if on_cpu else "auto"
    stated = fields.get("dtype") or fields.get("torch_dtype") or (fields.get("text_config") or {}).get("dtype")
    return "auto" if stated else torch.bfloat16


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Errors of transformers inside the `with`, or from a config's values, become CheckpointErrors of one line."""
    try:
        yield
    except DropformerError:
        raise
    except Exception as error:  # attributes, divisions, recursion, validators: config.json can cause any of them
        raise CheckpointError(_why(path, error)) from error


def _why(path: Path, error: Exception) -> str:
    said = reason(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"{path} does not fit on the device; give --device-map auto, another --device, or prune by --plan"
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return f"{path} {OWN_CODE}"
    if "does not recognize this architecture" in str(error):
        kind = shown(read_config(path)["model_type"])
        return (
            f"{path}: transformers {transformers.__version__} has no model of type {kind}, and config.json names no "
            "code (auto_map) that would build it"
        )
    if isinstance(error, KeyError) and (fields := _holding(read_config(path), error.args[0])):
        said = f"{shown(error.args[0])} is no value of `{fields[0]}` in config.json"
    return f"{path} cannot be loaded: {type(error).__name__}: {said}"


def _holding(config: Mapping[str, Any], value: object) -> list[str]:
    """The fields of a config, at any depth, that have a value."""
    inner = [_holding(section, value) for section in config.values() if isinstance(section, dict)]
    return [*(key for key, held in config.items() if held == value), *chain(*inner)]


def check_size(path: Path, fields: Mapping[str, Any], config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Raises CheckpointError where config.json describes far more numbers than the files hold, before memory is taken.

    Quantized files hold other numbers than the model has; `check_whole` still looks at them.
    """
    if fields.get("quantization_config"):
        return
    held = sum(math.prod(span.shape) for span in open_checkpoint(path).tensors.values())
    with one_line_errors(path):
        model = built_on_meta(config, trust_remote_code)
        described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if described > SIZE_RATIO * held + SIZE_SLACK:
        raise CheckpointError(
            f"{path}: config.json describes a model of {described:,} numbers, and the files hold {held:,}; "
            "get the model's own config.json"
        )


def weightless(path: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint folder on the meta device, to ask it about names and shapes."""
    config = read_model_config(path, trust_remote_code)
    with one_line_errors(path):
        return built_on_meta(config, trust_remote_code)


def built_on_meta(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of a config without weights."""
    with quiet_transformers(), torch.device("meta"):
        return build(config, trust_remote_code=trust_remote_code)


def build(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model with the head that its config names, without the weights of any checkpoint."""
    loader = auto_class(config)
    if hasattr(loader, "from_config"):
        return loader.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return loader._from_config(copy.deepcopy(config), dtype=dtype)


def usable_device(name: torch.device | str | None) -> torch.device:
    """The named device; None is the first GPU, else the CPU.  Raises ModelError for one that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = reason(error)
        raise ModelError(f"device `{name}` cannot be used ({said}); expected cpu, cuda or cuda:N") from None
    return device


def read_model_config(path: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config object of a checkpoint folder.  Raises CheckpointError for one that transformers cannot use."""
    fields = read_config(path)
    if is_own_deci(fields):
        from dropformer.prune.loading.deci.load import dropformer_config

        with one_line_errors(path):
            return config_from(dropformer_config(fields))
    with one_line_errors(path), quiet_transformers():
        if needs_own_code(fields):
            _learn(path, fields, trust_remote_code)
        if fields["model_type"] == REMOTE_TYPE:
            return config_from({**fields, "_name_or_path": str(path)})
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def _learn(path: Path, fields: dict[str, Any], trust_remote_code: bool) -> None:
    """Register a model type from the code beside the checkpoint.  Raises CheckpointError where it is not
    trusted."""
    if not trust_remote_code:
        raise CheckpointError(f"{path} {OWN_CODE}")
    learn_own_code(fields, path)


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that loads a config's model with the head it was saved with: an Auto class, or the named class."""
    base = modeling.base_config_class(config)
    pruned = modeling.pruned_config_class(base)  # registers with every Auto class
    architecture = (getattr(config, "architectures", None) or [""])[0].removeprefix("Dropformer")
    known = {name: auto._model_mapping[base] for name, auto in _autos().items() if base in auto._model_mapping}
    for name, native in known.items():
        if getattr(native, "__name__", "") == architecture:
            return getattr(transformers, name)
    native = getattr(transformers, architecture, None)
    if known and isinstance(native, type) and issubclass(native, PreTrainedModel) and native.config_class is base:
        return modeling.pruned_model_class(native, pruned) if isinstance(config, pruned) else native
    if usual := next((name for name in HEADS if name in known), None):
        return getattr(transformers, usual)
    if hasattr(config, "auto_map"):
        return transformers.AutoModelForCausalLM
    raise ModelError(f"transformers has no model for configs of type {config.model_type}")


def _autos() -> dict[str, Any]:
    """Every Auto class of models by name, the usual heads first."""
    names = [*HEADS, *(name for name in vars(modeling_auto) if name.startswith("AutoModel") and name not in HEADS)]
    return {name: getattr(modeling_auto, name) for name in names}
