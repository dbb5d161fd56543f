"""Reading config.json: a JSON object of bounded size with a model_type and plausible counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dropformer.prune.errors import CheckpointError, shown
from dropformer.prune.files.safetensors_header import TensorSpan
from dropformer.prune.files.strict_json import read_object

CONFIG = "config.json"

BLOCK_COUNTS = {
    "": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "num_hidden_groups"),
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
"""Config fields with the number of blocks of a stack, by the stack's name."""

PREDICTING = ("num_nextn_predict_layers", "num_mtp_modules", "num_mtp_layers", "mtp_num_layers")
"""Config fields with the number of blocks of multi-token prediction, which may count on from a stack's last one."""

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")

_COUNTED = re.compile(r"layers$|blocks$|depths?$|experts$|^n_layer$|hidden_groups$|stages$")
_FREE = re.compile(r"^max_|window|^num_dense_layers$|^first_k")  # bounds and thresholds, which build no modules
_ALWAYS_FINE = 512
_MOST_BUILT = 4096  # blocks or experts of a model that is built from its config alone
_LARGEST_NUMBER = 1 << 23  # for counts that build no modules: positions, buckets, heads


def read_config(folder: Path, name: object = None) -> dict[str, Any]:
    """The content of a folder's config.json.

    name: the folder's name in messages.  Raises CheckpointError if the file is missing, not a JSON object, without
    a model_type, or redirects to other weights or code.
    """
    path = folder / CONFIG
    if not path.exists():
        raise CheckpointError(f"{shown(name or folder, 1000)} has no config.json; expected a Hugging Face folder")
    config = read_object(path)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise CheckpointError(f"{shown(path, 1000)} has no model_type; expected a transformers config")
    architectures = config.get("architectures")
    listed = isinstance(architectures, list) and all(isinstance(item, str) for item in architectures)
    if architectures is not None and not listed:
        raise CheckpointError(f"{shown(path, 1000)}: architectures is not a list of class names; get the model again")
    _check_redirects(config, shown(path, 1000))
    _check_dtype(config, shown(path, 1000))
    return config


def _check_redirects(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for fields that make transformers load weights or code from outside the folder."""
    if config.get("transformers_weights") is not None:
        raise CheckpointError(f"{where}: transformers_weights names other weights than the folder's; remove the field")
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        if "/" in str(config.get(key)):
            raise CheckpointError(f"{where}: {key} names code on the Hub ({shown(config[key])}); remove the field")
        if "flex" in str(config.get(key)):
            raise CheckpointError(f"{where}: {key} is {shown(config[key])}, which cannot be traced; remove the field")


def _check_dtype(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for a dtype that no model computes in; weights of 8 bits need a quantization_config."""
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        eight = "quantization_config" in config and str(value).startswith("float8")
        if value not in (None, *DTYPES) and not eight:
            raise CheckpointError(
                f"{where}: {key} is {shown(value)}, expected {' or '.join(DTYPES)}; correct the field"
            )


def block_count(config: Mapping[str, Any]) -> int | None:
    """The number of blocks in a known field of the config's top level, or None."""
    found = [config[key] for key in BLOCK_COUNTS[""] if type(config.get(key)) is int and config[key] > 0]
    return found[0] if found else None


def check_counts(config: Mapping[str, Any], tensors: Iterable[TensorSpan], where: object) -> None:
    """Raises CheckpointError if a config counts more blocks or experts than the files could hold.

    Each block or expert has a tensor of its own or a row of a stacked one [E, M, N].  Without this check, a config
    with a billion blocks would be built for hours before any error.
    """
    spans = list(tensors)
    stacked = max((span.shape[0] for span in spans if len(span.shape) > 2), default=0)
    rows = max((span.shape[0] for span in spans if span.shape), default=0)
    most = max(_ALWAYS_FINE, len(spans), stacked)
    for key in BLOCK_COUNTS[""]:
        if type(value := config.get(key)) is int and value <= 0 and key != "num_hidden_groups":
            raise CheckpointError(f"{where}: config.json says {key} is {shown(value)}; get the model's own config.json")
    for key in ("id2label", "label2id"):
        if isinstance(config.get(key), (Mapping, list)) and len(config[key]) > max(_ALWAYS_FINE, rows):
            raise CheckpointError(
                f"{where}: config.json has {len(config[key])} entries in {key}, but no tensor has as many rows; "
                "get the model's own config.json"
            )
    for key, value in _numbers(config):
        limit = None
        if _COUNTED.search(key) and not _FREE.search(key):
            limit = most
        elif key == "num_labels":  # becomes a dictionary
            limit = max(_ALWAYS_FINE, rows)
        elif key.startswith(("num_", "n_")):
            limit = _LARGEST_NUMBER
        if limit is not None and value > limit:
            raise CheckpointError(
                f"{where}: config.json says {shown(key)} is {shown(value)}, but the files hold {len(spans)} tensors; "
                "get the model's own config.json"
            )


def check_plausible(config: Mapping[str, Any], where: object) -> None:
    """`check_counts` for a config without files beside it, by what no model has."""
    for key, value in _numbers(config):
        if _COUNTED.search(key) and not _FREE.search(key) and value > _MOST_BUILT:
            raise CheckpointError(f"{where}: config.json says {shown(key)} is {shown(value)}, more than any model has")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every integer in a config with its key; within a list, the list's key."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, str(name))
    elif isinstance(value, list):
        if re.search(r"depths?$|stages$", key):  # lists of counts; other lists hold indices, sizes, tokens
            for item in value:
                yield from _numbers(item, key)
    elif type(value) is int:
        yield key, value


def auto_class_name(architecture: str, autos: Iterable[str]) -> str:
    """Which of some Auto classes loads an architecture with its head; AutoModel for one without.

    ViTForImageClassification: AutoModelForImageClassification; BartForConditionalGeneration: AutoModelForSeq2SeqLM.
    """
    known, head = list(autos), architecture.rpartition("For")[2] if "For" in architecture else ""
    wanted = [f"AutoModelFor{head}"]
    if head == "ConditionalGeneration":
        wanted += ["AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"]
    if architecture.endswith("LMHeadModel"):
        wanted += ["AutoModelForCausalLM"]
    return next((name for name in wanted if name in known), "AutoModel")
