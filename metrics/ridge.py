"""Ridge regression from sums that are added up in float64, its penalty chosen on text of another kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
SKETCH = 48  # random mixtures of the outputs that stand for all of them where penalties are compared


class Sums:
    """Weighted second moments of inputs z [n, K] and targets r [n, D]: all that a ridge fit needs.

    Products of a window are taken in the data's own precision, windows are added up in float64 on the CPU.
    Memory: K x (K + D) numbers.
    """

    def __init__(self) -> None:
        self.weight = self.rr = 0.0
        self.zz: Tensor | float = 0.0
        self.zr: Tensor | float = 0.0

    def add(self, z: Tensor, r: Tensor, weight: Tensor) -> None:
        """z: [..., K], r: [..., D], weight: [...]."""
        z, r = z.float().flatten(0, -2), r.float().flatten(0, -2)
        root = weight.float().flatten().sqrt()[:, None]
        z, r = z * root, r * root
        self.zz = self.zz + (z.T @ z).to("cpu", torch.float64)
        self.zr = self.zr + (z.T @ r).to("cpu", torch.float64)
        self.rr += float(r.double().square().sum()) if r.device.type == "cpu" else float(r.square().sum())
        self.weight += float(weight.sum())

    def mean(self) -> tuple[Tensor, Tensor, float]:
        """E[z z'], E[z r'], E[|r|^2]."""
        assert isinstance(self.zz, Tensor) and isinstance(self.zr, Tensor)
        return self.zz / self.weight, self.zr / self.weight, self.rr / self.weight


def solve(zz: Tensor, zr: Tensor, penalty: float) -> Tensor:
    """W [K, D] that minimizes E|r - W'z|^2 + penalty * (mean of z's squares) * |W|^2.  Float64."""
    ridge = zz + penalty * zz.diagonal().mean() * torch.eye(len(zz), dtype=zz.dtype)
    return torch.cholesky_solve(zr, torch.linalg.cholesky(ridge))


def error(zz: Tensor, zr: Tensor, rr: float, w: Tensor) -> float:
    """The share of E|r|^2 that W'z leaves: 1 does nothing, 0 is exact."""
    return 1 + float((w * (zz @ w)).sum() - 2 * (w * zr).sum()) / max(rr, 1e-300)


def fit(groups: Sequence[Sums], penalties: Sequence[float] = PENALTIES) -> tuple[Tensor, float, float]:
    """(W [K, D], its penalty, what it leaves of another group's error), groups weighing the same.

    For each penalty a fit on all groups but one is judged on that one; groups are kinds of text, so the
    penalty that wins is one that carries over to text of another kind.  W is zero where none does.
    """
    means = [group.mean() for group in groups]
    scores = [_left_over(means, penalty) for penalty in penalties]
    best = min(range(len(scores)), key=scores.__getitem__)
    zz, zr, _ = _average(means)
    if scores[best] >= 1:
        return torch.zeros_like(zr), penalties[best], 1.0
    return solve(zz, zr, penalties[best]), penalties[best], scores[best]


Mean = tuple[Tensor, Tensor, float]


def _average(means: Sequence[Mean]) -> Mean:
    zz, zr, rr = zip(*means, strict=True)
    return torch.stack(zz).mean(0), torch.stack(zr).mean(0), sum(rr) / len(rr)


def _left_over(means: Sequence[Mean], penalty: float) -> float:
    """The mean error on each group of the fit on the others; a single group judges its own fit."""
    width = means[0][1].shape[1]
    mix = torch.eye(width, dtype=torch.float64)
    if width > SKETCH:
        mix = torch.randn(width, SKETCH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / SKETCH**0.5
    total = 0.0
    for i, (zz, zr, rr) in enumerate(means):
        others = [m for j, m in enumerate(means) if j != i] or list(means)
        other_zz, other_zr, _ = _average(others)
        total += error(zz, zr @ mix, rr, solve(other_zz, other_zr @ mix, penalty))
    return total / len(means)


def token_weights(stream: Tensor, share: float = 0.1) -> Tensor:
    """What each token counts in a fit, [B, T] from the stream [B, T, D]; they sum to the number of tokens.

    The inverse square of the stream's norm, as a norm follows it, so that errors are relative.  Attention
    sinks (the first token, and any with 4 times the median norm) have huge norms and are few, but every
    later token attends to them: together they weigh `share`.  Without that a fit may break them (measured:
    perplexity 3.0 times dense instead of 1.4, in LOG.md).
    """
    size = stream.float().norm(dim=-1)
    sink = size > 4 * size.median()
    sink[:, 0] = True
    inverse = size.clamp_min(1e-30).square().reciprocal()
    usual, rare = inverse * ~sink, sink.float()
    parts = ((usual, 1 - share), (rare * inverse, share))
    return sum(part * (weight * size.numel() / part.sum().clamp_min(1e-30)) for part, weight in parts)  # type: ignore[return-value]
