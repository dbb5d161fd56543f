"""GGUF file -> Hugging Face folder: config, safetensors, tokenizer, generation config, chat template.

Weights are converted exactly.  A quantized value is a scale times an integer plus an offset, which 16 bits cannot hold,
so quantized files become float32; rounding to bfloat16 would make a slightly different model.  A file whose values all
fit bfloat16 or float16 keeps that dtype.  A folder is converted once and cached.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from dropformer.progress import Tell, silent
from dropformer.prune.errors import CheckpointError, reason
from dropformer.prune.files.output_paths import cache_folder
from dropformer.prune.formats.gguf.header import GgufHeader, read_gguf_header
from dropformer.prune.loading.quiet import quiet_streams, quiet_transformers
from dropformer.recipes.cache import building, place
from dropformer.recipes.gguf_config import read_config
from dropformer.recipes.gguf_tokenizer import gguf_tokenizer

LAYOUT = 2
"""Version of the conversion; increase it when the output for a file changes."""
SAMPLE = 1 << 20
# Not parameters: rotary frequency tables, which transformers derives from the config.
TABLES = ("rope_freqs.", "rope_factors_long.", "rope_factors_short.")


def convert_gguf(path: Path, progress: Tell = silent) -> Path:
    """The Hugging Face folder for the GGUF file at `path`, converted now or earlier.

    Raises CheckpointError if the file is corrupt or cannot be converted exactly, OutputError if the cache cannot be
    written.
    """
    path = path.resolve()
    target = cache_folder() / "gguf" / f"{path.stem}-{fingerprint(path)}"
    if target.is_dir():
        return target
    with building(target, progress) as scratch:
        if not target.is_dir():
            progress(f"converting {path.name} (once)")
            place(write_folder(path, scratch / "folder"), target)
    return target


def fingerprint(path: Path) -> str:
    """16 hex digits of the file's size, time and ends, and of the converter's versions."""
    try:
        status = path.stat()
        with path.open("rb") as file:
            head = file.read(SAMPLE)
            file.seek(max(0, status.st_size - SAMPLE))
            tail = file.read(SAMPLE)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(head + tail)
    facts = (status.st_size, status.st_mtime_ns, LAYOUT, transformers.__version__)
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def write_folder(path: Path, folder: Path) -> Path:
    """Convert the GGUF file at `path` into the new `folder`.  Raises CheckpointError."""
    with quiet_transformers(), quiet_streams():
        header = read_gguf_header(path)
        with _one_line_errors(path):
            tokenizer = gguf_tokenizer(path, header)
            model, info = _load(path, header)
        _all_accounted_for(path, header, model, info)
        plain = _made_plain(model)
        nn.Module.to(plain, exact_dtype(model))
        plain.save_pretrained(folder)
        tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.save_pretrained(folder)
    return folder


def _made_plain(model: PreTrainedModel) -> PreTrainedModel:
    """`model` without marks of its GGUF source; transformers would refuse to save it as a quantized one."""
    for owner, mark in (
        (model, "hf_quantizer"),
        (model.config, "quantization_config"),
        (model.config, "_model_name_or_path"),
    ):
        if hasattr(owner, mark):
            delattr(owner, mark)
    return model


def _load(path: Path, header: GgufHeader) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in float32, and transformers' record of missing parameters."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        config=read_config(path, header),
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, info = loaded
    return model, info


def _all_accounted_for(path: Path, header: GgufHeader, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raises CheckpointError unless every parameter came from the file and every tensor was used."""
    wrong = sorted([*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])])
    if wrong:
        raise CheckpointError(
            f"{path.name} lacks {len(wrong)} of the model's parameters ({wrong[0]}); use its Hugging Face folder"
        )
    if any(name.startswith(TABLES) for name in header.tensors):
        raise CheckpointError(
            f"{path.name} scales its rotary frequencies by a table, which transformers would ignore; "
            "use the model's Hugging Face folder"
        )
    tied = {"output.weight"} if model.config.tie_word_embeddings else set()
    have = sum(tensor.elements for name, tensor in header.tensors.items() if name not in tied)
    used = sum(parameter.numel() for parameter in model.parameters())
    if have != used:
        raise CheckpointError(
            f"{path.name} has {have} weights, but transformers made a model of {used}; "
            "use the model's Hugging Face folder"
        )


def exact_dtype(model: PreTrainedModel) -> torch.dtype:
    """The first of bfloat16, float16, float32 that holds every parameter without rounding."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in model.parameters()):
            return dtype
    return torch.float32


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turns any error of the file's readers into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a corrupt file can raise any type: struct, NumPy, key, Unicode, memory map
        raise CheckpointError(
            f"{path.name} cannot be read as a GGUF model ({type(error).__name__}: {reason(error, 200)}); get it again"
        ) from error
