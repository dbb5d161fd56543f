"""Run calibration windows through a model once and score every layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.metrics.analysis.capture import WindowScores, capturing
from dropformer.metrics.analysis.scores import LayerScore, Scores
from dropformer.metrics.calibration.data import CalibrationData
from dropformer.progress import Tick
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.proof import prove
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.discovery.trace import members_of
from dropformer.prune.errors import CalibrationError
from dropformer.prune.loading.device import input_device
from dropformer.prune.loading.parts import evaluating, tensors_in
from dropformer.prune.samples.inputs import as_head_reads, uncached

Batch = Mapping[str, Tensor] | Tensor


def analyze_model(
    model: nn.Module,
    batches: Iterable[tuple[Batch, Tensor | None] | Batch],
    architecture: Architecture | None = None,
    ref: ModelRef | None = None,
    progress: Tick | None = None,
) -> Scores:
    """Similarity of every block, attention layer and MLP layer, from one forward pass over `batches`.

    Each batch is (inputs, scored): a mapping of forward arguments or one tensor, and which tokens count
    [B, T] bool (None: all).  Only sums are kept; of a transformers model just the trunk runs, without
    logits.  Raises ArchitectureError before the pass when the model's blocks cannot be proven, and
    CalibrationError when there is nothing to average.
    """
    first, pairs = _peek(batches)
    architecture = proven(model, first[0], architecture)
    parts: list[WindowScores] = []
    with measuring(model, architecture) as run:
        for inputs, scored in pairs:
            parts.append(run(inputs, scored))
            if progress:
                progress(sum(map(len, parts)), sum(part.total() for part in parts))
    return scores_of(model, architecture, joined(parts), ref)


def joined(parts: Sequence[WindowScores]) -> WindowScores:
    """The rows of all parts, one after another."""
    return WindowScores(torch.cat([part.sums for part in parts]), torch.cat([part.tokens for part in parts]))


def proven(model: nn.Module, batch: Batch | None = None, told: Architecture | None = None) -> Architecture:
    """The architecture of a model, found or told, and proven.  A module without a config needs a batch of its
    inputs."""
    sample = None
    if isinstance(batch, Mapping) and {"input_ids", "pixel_values"} <= batch.keys():
        sample = as_inputs(model, batch)  # images and their places in the text belong together
    elif batch is not None and not hasattr(model, "config"):
        sample = _sample(model, batch)
    architecture = told or discover(model, sample)
    prove(model, architecture, sample)
    return architecture


@contextmanager
def measuring(model: nn.Module, architecture: Architecture) -> Iterator[Callable[[Batch, Tensor | None], WindowScores]]:
    """Inside the `with`, a function that runs one batch through the trunk and returns its rows."""
    part = trunk(model)
    switches = [module for module in part.modules() if hasattr(module, "set_attention_type")]
    with torch.inference_mode(), evaluating(model), capturing(model, architecture) as capture:

        def run(batch: Batch, scored: Tensor | None) -> WindowScores:
            inputs = as_inputs(part, batch)
            capture.clear()
            capture.scored = scored
            capture.batch = batch_size(inputs)
            with _same_attention(switches):
                part(**inputs)
            return capture.take()

        yield run


@contextmanager
def _same_attention(switches: Sequence[Any]) -> Iterator[None]:
    """After the `with`, BigBird's attention is sparse again, which a short text makes a full one."""
    before = [(module, module.attention_type) for module in switches]
    yield
    for module, kind in before:
        if module.attention_type != kind:
            module.set_attention_type(kind)


def scores_of(model: nn.Module, architecture: Architecture, rows: WindowScores, ref: ModelRef | None = None) -> Scores:
    """Scores from the rows of all windows.  Raises CalibrationError where a layer has no finite number."""
    return Scores(
        model=ref or ModelRef(name=type(model).__name__),
        windows=len(rows),
        tokens=rows.total(),
        layers=layer_scores(architecture.layers(), rows),
        outline=summarize(model, architecture),
    )


def layer_scores(layers: Sequence[Layer], rows: WindowScores) -> list[LayerScore]:
    """The mean over all tokens, and its standard error over windows, of each layer.

    Raises CalibrationError where a layer gave no finite number.
    """
    mean, error = means(rows), standard_error(rows)
    bad = (~torch.isfinite(mean)).nonzero()
    if len(bad):
        raise CalibrationError(
            f"{layers[int(bad[0])]} has no finite similarity: the model's hidden states overflow or a layer did not "
            "run; try --dtype float32"
        )
    return [
        LayerScore(layer=str(layer), similarity=float(mean[i]), stderr=None if error is None else float(error[i]))
        for i, layer in enumerate(layers)
    ]


def means(rows: WindowScores) -> Tensor:
    """Similarity averaged over all tokens, [layers] float64."""
    return rows.sums.sum(0) / rows.tokens.sum(0)


def standard_error(rows: WindowScores) -> Tensor | None:
    """Standard error of `means`, [layers] float64; None for fewer than two windows.

    Windows are the sampling unit and may differ in length, so it is that of a ratio of totals (Cochran,
    Sampling Techniques, 1977, chapter 6); for equal lengths, the standard deviation of the windows'
    means over sqrt(N).
    """
    n, tokens = len(rows), rows.tokens.double()
    if n < 2:
        return None
    residuals = rows.sums - tokens * means(rows)
    return (residuals.square().sum(0) / (n - 1) / n).sqrt() / tokens.mean(0)


def calibrated(scores: Scores, windows: CalibrationData) -> Scores:
    """The scores with the calibration they came from written in."""
    return scores.model_copy(update={"calibration": windows.ref})


def trunk(model: nn.Module) -> nn.Module:
    """The model without its language-model head, so that no logits are computed."""
    return getattr(model, getattr(model, "base_model_prefix", "") or "-", model)


def as_inputs(model: nn.Module, batch: Batch, device: torch.device | None = None) -> dict[str, Any]:
    """Forward arguments on a device (None: the model's); a lone tensor is the first parameter of forward."""
    names = inspect.signature(model.forward).parameters
    fields = {next(iter(names)): batch} if isinstance(batch, Tensor) else dict(batch)
    device = device or input_device(model)
    device = torch.device("cpu") if device.type == "meta" else device  # a blueprint: only shapes matter
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in fields.items()}
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" in names
    moved = as_head_reads(moved, model)
    if two and "input_ids" in moved and "decoder_input_ids" not in moved:
        moved["decoder_input_ids"] = shifted(moved["input_ids"], model)
    return moved | uncached(model)


def shifted(ids: Tensor, model: nn.Module) -> Tensor:
    """What a decoder reads when it is to write `ids`: its start token, and all of them but the last.  [B, T]"""
    config: Any = getattr(model, "config", None)
    named = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    start = next((token for token in named if isinstance(token, int)), 0)
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)


def batch_size(inputs: Mapping[str, Any]) -> int | None:
    """The number of samples in forward arguments: the length of their token ids, else of the first tensor.

    Other tensors may have another first dimension, as memories [layers, B, ...] do.
    """
    found = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
    ids = [value for value in found if value.ndim == 2 and not value.is_floating_point()]
    return len((ids or found)[0]) if found else None


def _sample(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The first sample of a batch, where the model gives for it alone what it gives in the batch; else all of it.

    Tensors whose first dimension is not the batch's, such as memories [layers, B, ...], cannot be told by their shape.
    Time: a forward pass of the batch.
    """
    whole = as_inputs(model, batch)
    few = {key: value[:1] if isinstance(value, Tensor) and value.ndim else value for key, value in whole.items()}
    try:
        with torch.no_grad(), evaluating(model):
            alone, among = (next(tensors_in(list(members_of(model(**each)).values()))) for each in (few, whole))
        same = alone.shape[1:] == among.shape[1:] and torch.allclose(alone, among[: len(alone)], rtol=1e-2, atol=1e-3)
    except Exception:  # whatever the model's own code raises for a part of its batch
        return whole
    return few if same and len(alone) < len(among) else whole


def _peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    iterator = ((b if isinstance(b, tuple) else (b, None)) for b in batches)
    first = next(iterator, None)
    if first is None:
        raise CalibrationError("there are no calibration batches; give at least one")
    return first, chain([first], iterator)
