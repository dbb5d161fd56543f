"""Checkpoints of the format `deci`, written from tiny dense ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dropformer import api
from dropformer.prune import deci
from dropformer.prune.checkpoint import native_class, read_config
from dropformer.prune.files import copy_checkpoint, new_folder, open_checkpoint
from dropformer.prune.load import load
from dropformer.prune.names import meta_model, parameter_names
from dropformer.prune.replacing import replacements, stored_dtype
from dropformer.prune.surgery import Surgery, config_from


def drop(source: Path, spec: str) -> PreTrainedModel:
    dense = api.Opened(load(source), None, source, api.reference(source.name, source), None)
    return api.drop(dense, api.plan_unscored(dense.ref, api.outline(dense.model), spec, (), None))


def write(source: Path, spec: str, out: Path) -> PreTrainedModel:
    """Drop layers, write the deci checkpoint, return the pruned model in memory."""
    pruned = drop(source, spec)
    surgery: Surgery = pruned.dropformer.surgery
    config, checkpoint, native = read_config(source), open_checkpoint(source), native_class(type(pruned))
    prefix, names = (
        native.base_model_prefix,
        parameter_names(meta_model(native, config_from(config)), checkpoint.tensors),
    )
    fields = deci.deci_config(config, surgery, set(names.values()))
    rename = deci.deci_renaming(surgery, names, prefix)
    extra = replacements(surgery, names, rename, prefix) | deci.deci_tensors(fields, stored_dtype(source))
    with new_folder(out) as folder:
        copy_checkpoint(checkpoint, folder, rename, replace=extra)
        (folder / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
        deci.copy_code(folder)
    return pruned


@pytest.fixture(scope="session")
def pruned_in_memory() -> Callable[[Path, str], PreTrainedModel]:
    return drop


@pytest.fixture(scope="session")
def write_deci() -> Callable[[Path, str, Path], PreTrainedModel]:
    return write


@pytest.fixture(scope="session")
def lively(tiny) -> Callable[..., Path]:
    """A tiny model in a folder whose norms and biases are no ones and zeros, so that a lost one shows."""

    def make(folder: Path, family: str, **changes) -> Path:
        model = tiny(family, **changes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * (0.5 if name.endswith("bias") else 0.2))
        model.save_pretrained(folder)
        return folder

    return make
