"""Open a model by name: fetch, convert, load."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dropformer.progress import Tell
from dropformer.prune.architecture import Architecture
from dropformer.prune.artifact import ModelRef
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.proof import prove
from dropformer.prune.errors import ModelError
from dropformer.prune.formats.export import reference
from dropformer.prune.loading.load import load
from dropformer.prune.loading.tokenizer import bound_tokens, open_tokenizer
from dropformer.recipes import Recipe, open_source
from dropformer.recipes.placement import Placement


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, its tokenizer (None if it has none), and the folder of its files.

    `file` is the .gguf file from which the folder at `path` was converted, if any.
    """

    model: PreTrainedModel
    tokenizer: Any
    path: Path
    ref: ModelRef
    recipe: Recipe | None
    file: Path | None = None

    @cached_property
    def architecture(self) -> Architecture:
        """What is in the model, found and proven once.  Raises ArchitectureError."""
        found = discover(self.model)
        prove(self.model, found)
        return found


def open_model(
    name: str | Path,
    revision: str | None = None,
    placement: Placement | None = None,
    tell: Tell | None = None,
    weights: bool = True,
) -> LoadedModel:
    """Fetch, convert and load a model by name, as for `--model`.  Raises ModelError or CheckpointError.

    Without `weights`, `model` is None: the weights are read from `path` block by block.
    """
    place = placement or Placement()
    source = open_source(str(name), revision, tell)
    licence = source.recipe.licence if source.recipe else None
    ref = reference(str(source.name), source.path, source.revision, licence, source.hub)
    if source.quantized:
        ref = ref.model_copy(update={"file": source.quantized})
    if tell:
        tell(f"loading {source}" + (f", dequantized from {source.quantized}" if source.quantized else ""))
    model: Any = None
    if weights:
        model = load(source.path, torch_dtype(place.dtype), place.device, place.device_map, place.trust_remote_code)
    tokenizer = open_tokenizer(source.path, place.trust_remote_code)
    bound_tokens(tokenizer, model)
    return LoadedModel(model, tokenizer, source.path, ref, source.recipe, source.file)


def torch_dtype(name: str | None) -> torch.dtype | str | None:
    """The dtype of a name, as `load` takes it.  Raises ModelError for an unknown one."""
    if name in (None, "auto"):
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"dtype `{name}` is unknown; expected float32, bfloat16, float16 or auto")
    return dtype
