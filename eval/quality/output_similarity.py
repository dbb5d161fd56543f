"""How like two models' outputs are, where a model has no perplexity: encoders, encoder-decoders, vision models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropformer.metrics.analysis.analyze import as_inputs
from dropformer.metrics.blockwise.divergence import kl_divergence
from dropformer.prune.artifact import FrozenRecord


class OutputSimilarity(FrozenRecord):
    """The first output of the pruned model against the dense one's, averaged over its vectors.

    `cosine`: of logits or, without a head, of hidden states.  `kl`: KL(dense || pruned) in nats, and
    `agreement`: how often the first choices are the same (0 to 1); None where the output is no distribution.
    """

    on: str
    samples: int
    cosine: float
    kl: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        chosen = "" if self.kl is None else f", KL(dense || pruned) {self.kl:.4f} nats"
        same = "" if self.agreement is None else f", same first choice {self.agreement:.1%}"
        return f"outputs on {self.samples} samples of `{self.on}`: cosine {self.cosine:.4f}{chosen}{same}"


def output_similarity(
    dense: Any, pruned: Any, batches: Iterable[tuple[dict[str, Tensor], Any]], on: str
) -> OutputSimilarity:
    """Both models on the same batches of inputs; `on` names what these are."""
    rows, samples, chosen = [], 0, False
    with torch.inference_mode():
        for inputs, _ in batches:
            x, chosen = _vectors(dense, inputs)
            rows.append(_compare(x, _vectors(pruned, inputs)[0]))
            samples += len(next(iter(inputs.values())))
    cosine, kl, same = torch.cat(rows, dim=1).mean(1).tolist()
    return OutputSimilarity(
        on=on, samples=samples, cosine=cosine, kl=kl if chosen else None, agreement=same if chosen else None
    )


def _vectors(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """The first output as vectors [n, C] in float32, and whether they are logits of choices."""
    out = model(**as_inputs(model, inputs))
    config = model.config.get_text_config()
    logits = getattr(out, "logits", None)
    sizes = {getattr(config, "vocab_size", None), getattr(config, "num_labels", None)}
    first = out[0] if logits is None else logits
    if not isinstance(first, Tensor):  # a backbone's feature maps [B, C, H, W]: the deepest
        first = first[-1].movedim(1, -1)
    return first.float().flatten(0, -2), logits is not None and first.shape[-1] > 1 and first.shape[-1] in sizes


def _compare(x: Tensor, y: Tensor) -> Tensor:
    """Cosine, KL and equal first choice of each vector: x, y [n, C] -> [3, n] float64."""
    p, q = F.log_softmax(x, -1), F.log_softmax(y.to(x.device), -1)
    columns = (F.cosine_similarity(x, y.to(x.device), dim=-1), kl_divergence(p, q), p.argmax(-1) == q.argmax(-1))
    return torch.stack([column.double().cpu() for column in columns])
