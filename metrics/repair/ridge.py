"""Ridge regression from sums that are added up in float64, its penalty chosen on text that was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

PENALTIES = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SKETCH = 48  # random mixtures of the outputs that stand for all of them where penalties are compared
OUT_OF_DOMAIN_WEIGHT = (
    1 / 3
)  # what error on a kind of text that was not fitted on counts beside error on more of the same
HOLD_OUT = 4  # every so many windows of a kind judge penalties

Group = int | None  # a kind of text to fit on; None: windows of every kind that judge


def group_of(kind: int, window: int) -> Group:
    """The group of a kind's window, by its place among them."""
    return None if window % HOLD_OUT == HOLD_OUT - 1 else kind


class MomentSums:
    """Weighted second moments of inputs z [n, K] and targets r [n, D]: all that a ridge fit needs.

    Several targets share the inputs: a fit may aim at the sum of some.  Products of a window are taken in the
    data's own precision, windows are added up in float64 on the CPU.  Memory: K x (K + targets x D) numbers.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.zz: Tensor | float = 0.0
        self.zr: Tensor | float = 0.0  # [targets, K, D]
        self.rr: Tensor | float = 0.0  # [targets, targets]: inner products

    def add(self, z: Tensor, targets: Sequence[Tensor], weight: Tensor) -> None:
        """z: [..., K], targets: [..., D] each, weight: [...]."""
        root = weight.float().flatten().sqrt()[:, None]
        z = z.float().flatten(0, -2) * root
        rs = [r.float().flatten(0, -2) * root for r in targets]
        self.zz = self.zz + (z.T @ z).to("cpu", torch.float64)
        self.zr = self.zr + torch.stack([z.T @ r for r in rs]).to("cpu", torch.float64)
        flat = torch.stack([r.flatten() for r in rs])
        self.rr = self.rr + (flat @ flat.T).to("cpu", torch.float64)
        self.weight += float(weight.sum())

    def mean(self, targets: Sequence[int] = (0,)) -> Mean:
        """E[z z'], E[z r'], E[|r|^2] for r the sum of these targets."""
        assert isinstance(self.zz, Tensor) and isinstance(self.zr, Tensor) and isinstance(self.rr, Tensor)
        few = list(targets)
        rr = float(self.rr[few][:, few].sum())
        return self.zz / self.weight, self.zr[few].sum(0) / self.weight, rr / self.weight


Mean = tuple[Tensor, Tensor, float]


def solve(zz: Tensor, zr: Tensor, penalty: float) -> Tensor:
    """W [K, D] that minimizes E|r - W'z|^2 + penalty * (the sum over inputs k of E[z_k^2] |W_k|^2).  Float64.

    Each input is penalized by its own size, so that a few huge ones (the massive activations of attention
    sinks) do not make the penalty huge for all the others.
    """
    sizes = zz.diagonal()
    ridge = zz + torch.diag(penalty * sizes.clamp_min(1e-9 * float(sizes.max())))
    return torch.cholesky_solve(zr, torch.linalg.cholesky(ridge))


def error(zz: Tensor, zr: Tensor, rr: float, w: Tensor) -> float:
    """The share of E|r|^2 that W'z leaves: 1 does nothing, 0 is exact."""
    return 1 + float((w * (zz @ w)).sum() - 2 * (w * zr).sum()) / max(rr, 1e-300)


def fit(
    groups: Mapping[Group, MomentSums], penalties: Sequence[float] = PENALTIES, targets: Sequence[int] = (0,)
) -> tuple[Tensor, float, float]:
    """(W [K, D], its penalty, what it leaves of the error on text that was not fitted on), kinds weighing the same.

    Each penalty is judged twice: on held-out windows of all kinds, fitted on the rest, and on each kind, fitted
    on the others.  So the one that wins carries over to more text of the same kinds and to text of another.
    The last fit is on everything.  W is zero where no penalty helps; a lone group judges itself.
    Time: a K x K solve for each kind and one more, for each penalty tried, about four.
    """
    kinds = [sums.mean(targets) for kind, sums in groups.items() if kind is not None]
    judge = groups[None].mean(targets) if None in groups else None
    penalty, left_over = _least(lambda penalty: _left_over(kinds, judge, penalty), penalties)
    zz, zr, _ = _average(kinds)
    if judge is not None:
        share = groups[None].weight / sum(sums.weight for sums in groups.values())
        zz, zr = (1 - share) * zz + share * judge[0], (1 - share) * zr + share * judge[1]
    if left_over >= 1:
        return torch.zeros_like(zr), penalty, 1.0
    return solve(zz, zr, penalty), penalty, left_over


def _least(score: Callable[[float], float], penalties: Sequence[float]) -> tuple[float, float]:
    """The penalty of least score, and the score, downhill from the middle: scores have one valley."""
    at = len(penalties) // 2
    found = {at: score(penalties[at])}
    while True:
        for near in (at + 1, at - 1):
            if 0 <= near < len(penalties) and near not in found:
                found[near] = score(penalties[near])
                if found[near] < found[at]:
                    at = near
                    break
        else:
            return penalties[at], found[at]


def _average(means: Sequence[Mean]) -> Mean:
    zz, zr, rr = zip(*means, strict=True)
    return torch.stack(zz).mean(0), torch.stack(zr).mean(0), sum(rr) / len(rr)


def _left_over(kinds: Sequence[Mean], judge: Mean | None, penalty: float) -> float:
    """What a fit with this penalty leaves on text that it did not see."""
    abroad = [_judged([m for m in kinds if m is not kind], kind, penalty) for kind in kinds if len(kinds) > 1]
    home = _judged(kinds, judge or kinds[0], penalty) if judge or not abroad else None
    if home is None or not abroad:
        return sum(abroad) / len(abroad) if home is None else home
    return (1 - OUT_OF_DOMAIN_WEIGHT) * home + OUT_OF_DOMAIN_WEIGHT * sum(abroad) / len(abroad)


def _judged(fitted: Sequence[Mean], judge: Mean, penalty: float) -> float:
    """The share of the judge's error that a fit on the others leaves."""
    zz, zr, rr = judge
    width = zr.shape[1]
    mix = torch.eye(width, dtype=torch.float64)
    if width > SKETCH:
        mix = torch.randn(width, SKETCH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / SKETCH**0.5
    other_zz, other_zr, _ = _average(fitted)
    return error(zz, zr @ mix, rr, solve(other_zz, other_zr @ mix, penalty))


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
    least = (1e-3 * size.median()).clamp_min(1e-15)  # a token without an embedding of its own may begin at zero
    inverse = size.maximum(least).square().reciprocal()
    usual, rare = inverse * ~sink, sink.float()
    parts = ((usual, 1 - share), (rare * inverse, share))
    return sum(part * (weight * size.numel() / part.sum().clamp_min(1e-30)) for part, weight in parts)  # type: ignore[return-value]
