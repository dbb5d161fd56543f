"""Checkpoints of the format `deci`, written from tiny dense ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dropformer import api
from dropformer.prune.formats.export import reference
from dropformer.prune.loading.load import load


def drop(source: Path, spec: str) -> PreTrainedModel:
    dense = api.LoadedModel(load(source), None, source, reference(source.name, source), None)
    return api.drop(dense, api.plan_unscored(dense.ref, api.outline(dense.model), spec, (), None))


def write(source: Path, spec: str, out: Path) -> PreTrainedModel:
    """Drop layers, write the deci checkpoint, return the pruned model in memory."""
    pruned = drop(source, spec)
    api.save(pruned, out, "deci")
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
