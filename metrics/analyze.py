"""Run calibration windows through a model once and score every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.metrics.windows import Windows
from dropformer.metrics.capture import capturing
from dropformer.metrics.scores import LayerScore, Scores
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.census import outline_of
from dropformer.prune.discover import discover
from dropformer.prune.errors import CalibrationError
from dropformer.prune.proof import prove

Progress = Callable[[int, int], None]  # windows done, tokens done
Batch = Mapping[str, Tensor] | Tensor


def analyze_model(
    model: nn.Module,
    batches: Iterable[tuple[Batch, Tensor | None]],
    architecture: Architecture | None = None,
    ref: ModelRef | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Similarity of every block, attention layer and MLP layer, from one forward pass over `batches`.

    Each batch is (inputs, scored): a mapping of forward arguments or one tensor, and which tokens count
    [B, T] bool (None: all).  Only sums are kept; of a transformers model just the trunk runs, without
    logits.  Raises ArchitectureError before the pass when the model's blocks cannot be proven, and
    CalibrationError when there is nothing to average.
    """
    first, batches = _peek(batches)
    if architecture is None:
        sample = None if hasattr(model, "config") else as_inputs(model, _few(first[0]))
        architecture = discover(model, sample)
        prove(model, architecture, sample)
    sums, tokens = [], []
    with torch.inference_mode(), evaluating(model), capturing(model, architecture) as capture:
        for inputs, scored in batches:
            capture.scored = scored
            inputs = as_inputs(model, inputs)
            trunk(model)(**inputs)
            rows = capture.take()
            sums.append(rows)
            tokens.append(_count(scored, inputs, len(rows)))
            if progress:
                progress(sum(map(len, tokens)), int(sum(t.sum() for t in tokens)))
    all_sums, all_tokens = torch.cat(sums), torch.cat(tokens)
    return Scores(
        model=ref or ModelRef(name=type(model).__name__),
        windows=len(all_sums),
        tokens=int(all_tokens.sum()),
        layers=summarize(architecture.layers(), all_sums, all_tokens.double()),
        outline=outline_of(model, architecture),
    )


def summarize(layers: Sequence[Layer], sums: Tensor, tokens: Tensor) -> list[LayerScore]:
    """Scores from per-window sums [N, layers] and scored tokens per window [N], in float64.

    Similarity is the mean over all tokens; the standard error is that of the windows' means, None for
    one window.  Raises CalibrationError where a layer gave no finite number.
    """
    mean = sums.sum(0) / tokens.sum()
    bad = (~torch.isfinite(mean)).nonzero()
    if len(bad):
        raise CalibrationError(f"{layers[int(bad[0])]} has no finite similarity: the model's hidden states overflow or a "
                               "layer did not run; try --dtype float32")  # fmt: skip
    each = sums / tokens[:, None]
    error = each.std(0) / len(each) ** 0.5 if len(each) > 1 else None
    return [
        LayerScore(layer=str(layer), similarity=float(mean[i]), stderr=None if error is None else float(error[i]))
        for i, layer in enumerate(layers)
    ]


def calibrated(scores: Scores, windows: Windows) -> Scores:
    """The scores with the calibration they came from written in."""
    return scores.model_copy(update={"calibration": windows.ref})


def trunk(model: nn.Module) -> nn.Module:
    """The model without its language-model head, so that no logits are computed."""
    return getattr(model, getattr(model, "base_model_prefix", "") or "-", model)


class evaluating:
    """Inside the `with`, no dropout and no cache; the training mode is back on exit."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: Any) -> None:
        self.model.train(self.training)


def as_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Forward arguments on the model's device; a lone tensor goes to the first parameter of forward."""
    import inspect

    names = inspect.signature(model.forward).parameters
    fields = {next(iter(names)): batch} if isinstance(batch, Tensor) else dict(batch)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in fields.items()}
    return moved | {"use_cache": False} if "use_cache" in names else moved


def _few(batch: Batch) -> Batch:
    return batch[:1] if isinstance(batch, Tensor) else {k: v[:1] for k, v in batch.items()}


def _peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    from itertools import chain

    iterator = ((b if isinstance(b, tuple) else (b, None)) for b in batches)
    first = next(iterator, None)
    if first is None:
        raise CalibrationError("there are no calibration batches; give at least one")
    return first, chain([first], iterator)


def _count(scored: Tensor | None, inputs: Mapping[str, Any], rows: int) -> Tensor:
    if scored is not None:
        return scored.reshape(scored.shape[0], -1).sum(1)
    ids = next(v for v in inputs.values() if isinstance(v, Tensor))
    return torch.full((rows,), ids.shape[1] if ids.ndim > 1 else 1)
