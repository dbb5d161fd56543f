"""Ridge regression from second moments on the streams' own device, its penalty chosen on validation windows.

Worked example, one input and one output: z = (1, 2), r = (2, 4), weights 1.  E[zz] = 2.5, E[zr] = 5, E[rr] = 10.
Penalty p shrinks W = E[zr] / (E[zz] (1 + p)): 2 for p = 0, 1 for p = 1; the error left of E[rr] is 0 and 1/4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

PENALTIES = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SKETCH = 48  # random projections of the outputs on which penalties are compared
PANELS = 6  # of a symmetric product, of which 7/12 are computed
OUT_OF_DOMAIN_WEIGHT = 1 / 3  # weight of leave-one-domain-out error against in-domain validation error
HOLD_OUT = 4  # every fourth window of a domain validates penalties
DOMAINS = 2  # groups to fit on; more texts share them, so that memory does not grow

Group = int | None  # a domain to fit on; None: validation windows of every domain


def group_of(domain: int, window: int) -> Group:
    """The group of a domain's window, by its index."""
    return None if window % HOLD_OUT == HOLD_OUT - 1 else domain % DOMAINS


@dataclass(frozen=True)
class Fit:
    """A change W [K, D] (or [D, p, 1] per channel), its penalty, and the share of error left on validation windows:
    1, and a change of zero, if no penalty helps."""

    change: Tensor
    penalty: float
    left_over: float

    @property
    def helps(self) -> bool:
        return self.left_over < 1


Mean = tuple[Tensor, Tensor, Tensor]  # E[z z'] [..., K, K], E[z r'] for each target [targets, ..., K, D], E[r r']


class MomentSums:
    """Weighted second moments of inputs z [n, K] and targets r [n, D], sufficient for a ridge fit.

    Several targets share the inputs; a fit may be of the sum of some.  Products and sums are float32 on the
    inputs' device.  Memory: K x (K + targets x D) numbers.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.sums: list[Tensor] = []
        self._divided = False

    def add(self, z: Tensor, targets: Sequence[Tensor], weight: Tensor) -> None:
        """z: [..., K], targets: [..., D] each, weight: [...]."""
        root = weight.float().flatten().sqrt()[:, None].to(z.device)
        z = z.float().flatten(0, -2) * root
        rs = torch.stack([r.float().flatten(0, -2).to(z.device) * root for r in targets])
        zr = torch.stack([z.T @ r for r in rs])
        self._accumulate(weight, _gram(z), zr, torch.einsum("and,bnd->ab", rs, rs))

    def _accumulate(self, weight: Tensor, *parts: Tensor) -> None:
        if self.sums:
            for total, part in zip(self.sums, parts, strict=True):
                total += part
        else:
            self.sums = list(parts)
        self.weight += float(weight.sum())

    def mean(self) -> Mean:
        """The moments divided by the weight, in place: nothing can be added afterwards."""
        if not self._divided:
            self._divided = True
            for total in self.sums:
                total.div_(max(self.weight, 1e-30))
        zz, zr, rr = self.sums
        return zz, zr, rr


class ChannelSums(MomentSums):
    """The same with a few inputs per channel: z [n, D, p], targets [n, D], a fit [D, p, 1].

    Example: a norm's weight is the one input of its channel, p = 1; with a bias beside it p = 2.
    """

    def add(self, z: Tensor, targets: Sequence[Tensor], weight: Tensor) -> None:
        """z: [..., D, p], targets: [..., D] each, weight: [...]."""
        w = weight.float().flatten().to(z.device)
        z = z.float().flatten(0, -3)
        rs = torch.stack([r.float().flatten(0, -2).to(z.device) for r in targets])
        zz = torch.einsum("n,ndp,ndq->dpq", w, z, z)
        zr = torch.einsum("n,ndp,and->adp", w, z, rs)[..., None]
        self._accumulate(weight, zz, zr, torch.einsum("n,and,bnd->ab", w, rs, rs))


def _gram(z: Tensor) -> Tensor:
    """z'z [K, K] of z [n, K]; each pair of column panels is multiplied once."""
    edges = torch.linspace(0, z.shape[1], PANELS + 1).long().tolist() if z.shape[1] > 512 else [0, z.shape[1]]
    found = z.new_empty(z.shape[1], z.shape[1])
    for start, end in pairwise(edges):
        part = z[:, start:end].T @ z[:, start:]
        found[start:end, start:] = part
        found[start:, start:end] = part.T
    return found


def solve(zz: Tensor, zr: Tensor, penalty: float, exact: bool = False) -> Tensor:
    """W [..., K, D] that minimizes E|r - W'z|^2 + penalty * (the sum over inputs k of E[z_k^2] |W_k|^2).

    Each input is penalized by its own size, so that a few huge ones (the massive activations of attention sinks) do
    not inflate the penalty of the others.  Scaled to a unit diagonal, the matrix has a condition number of at most
    K / penalty, for which float32 is enough (1e-5 of the prediction on real moments; rounding the change to bfloat16
    costs 2e-3).  `exact`: float64, if the device has it.  Time: K^3 / 3 + 2 K^2 D.
    """
    sizes = zz.diagonal(dim1=-2, dim2=-1)
    root = sizes.clamp_min(max(1e-9 * float(sizes.max()), 1e-30)).sqrt()
    dtype = torch.float64 if exact and zz.device.type != "mps" else torch.float32
    ridge = (zz / root[..., :, None]).div_(root[..., None, :]).to(dtype)
    ridge.diagonal(dim1=-2, dim2=-1).add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(ridge)
    del ridge
    if failed.any() and not exact:
        return solve(zz, zr, penalty, True)
    return torch.cholesky_solve((zr / root[..., None]).to(dtype), factor).div_(root[..., None])


def error(zz: Tensor, zr: Tensor, rr: float, w: Tensor) -> float:
    """The share of E|r|^2 left by W'z: 1 for W = 0, 0 for an exact fit."""
    w = w.to(zz.dtype)
    return 1 + float((w * (zz @ w)).sum(dtype=torch.float64) - 2 * (w * zr).sum(dtype=torch.float64)) / max(rr, 1e-30)


def fit(
    groups: Mapping[Group, MomentSums],
    targets: Sequence[Sequence[int]] = ((0,),),
    penalties: Sequence[float] = PENALTIES,
    start: tuple[float, int] | None = None,
) -> list[Fit]:
    """Ridge fits of sums of targets, one per choice of targets, with equal weight per domain.

    Each penalty is validated twice: on held-out windows of all domains, fitted on the rest, and on each domain,
    fitted on the others, so that the best one generalizes to more text of the same domains and to other domains.  The
    choices share the penalty, as they share the factored matrix.  `start`: the penalty of a slot nearby, and the
    direction (1 or -1) in which to look for a better one.  The final fit uses everything.  A lone group validates
    itself.  Time: per penalty tried (two to four) a K x K factorization per domain and one more, and one at the end.
    Memory: three K x K matrices beside the sums, which are overwritten.
    """
    # Example, domains A and B and held-out windows H: each penalty is scored by the error on H of the fit on A + B,
    # weight 2/3, and the mean of the errors on B of the fit on A and on A of the fit on B, weight 1/3.
    domains = [sums.mean() for group, sums in groups.items() if group is not None]
    held_out = groups[None].mean() if None in groups else None
    domains, held_out = (domains, held_out) if domains else ([groups[None].mean()], None)
    mix = _mixtures(domains[0][1])
    left: dict[float, list[float]] = {}

    def score(penalty: float) -> float:
        left[penalty] = _left_over(domains, held_out, targets, mix, penalty)
        return sum(min(share, 1.0) for share in left[penalty])

    penalty = _least(score, penalties, start)
    zz, zr = _average([(mean[0], mean[1]) for mean in domains], into=True)
    if held_out is not None:
        share = groups[None].weight / sum(sums.weight for sums in groups.values())
        zz, zr = zz.lerp_(held_out[0], share), zr.lerp_(held_out[1], share)
    aims = torch.cat([_aim(zr, chosen) for chosen in targets], -1)
    changes = solve(zz, aims, penalty).float().chunk(len(targets), -1)
    shares = zip(changes, left[penalty], strict=True)
    return [Fit(w if share < 1 else torch.zeros_like(w), penalty, min(share, 1.0)) for w, share in shares]


def _mixtures(zr: Tensor) -> Tensor | None:
    """[D, SKETCH] random projections of the outputs, None if D is at most SKETCH."""
    width = zr.shape[-1]
    if width <= SKETCH:
        return None
    draw = torch.randn(width, SKETCH, generator=torch.Generator().manual_seed(0)) / SKETCH**0.5
    return draw.to(zr.device)


def _aim(zr: Tensor, chosen: Sequence[int], mix: Tensor | None = None) -> Tensor:
    """E[z r'] for r the sum of some targets, [..., K, D], or its projections."""
    total = zr[list(chosen)].sum(0)
    return total if mix is None else total @ mix


def _least(score: Callable[[float], float], penalties: Sequence[float], start: tuple[float, int] | None) -> float:
    """The penalty of least score, by descent from `start` in one direction, or from the middle in both."""
    at = penalties.index(start[0]) if start and start[0] in penalties else len(penalties) // 2
    sides = (start[1],) if start else (1, -1)
    found = {at: score(penalties[at])}
    while True:
        for near in (at + side for side in sides):
            if 0 <= near < len(penalties) and near not in found:
                found[near] = score(penalties[near])
                if found[near] < found[at]:
                    at = near
                    break
        else:
            return penalties[at]


def _average(parts: Sequence[tuple[Tensor, Tensor]], into: bool = False) -> tuple[Tensor, Tensor]:
    """The means of matrices; `into`: in place of the first of them."""
    zz, zr = parts[0] if into else (parts[0][0].clone(), parts[0][1].clone())
    for other in parts[1:]:
        zz, zr = zz.add_(other[0]), zr.add_(other[1])
    return zz.div_(len(parts)), zr.div_(len(parts))


def _left_over(
    domains: Sequence[Mean], held_out: Mean | None, targets: Sequence[Sequence[int]], mix: Tensor | None, penalty: float
) -> list[float]:
    """The validation error of a fit with this penalty, per choice of targets."""
    cross = [
        _validated([m for m in domains if m is not domain], domain, targets, mix, penalty)
        for domain in domains
        if len(domains) > 1
    ]
    out = [sum(shares) / len(cross) for shares in zip(*cross, strict=True)]
    if held_out is None and cross:
        return out
    home = _validated(domains, held_out or domains[0], targets, mix, penalty)
    if not cross:
        return home
    return [(1 - OUT_OF_DOMAIN_WEIGHT) * h + OUT_OF_DOMAIN_WEIGHT * o for h, o in zip(home, out, strict=True)]


def _validated(
    fitted: Sequence[Mean], held_out: Mean, targets: Sequence[Sequence[int]], mix: Tensor | None, penalty: float
) -> list[float]:
    """The share of error left on `held_out` by fits on the others, per choice of targets."""
    zz, zr = _average([(mean[0], mean[1]) for mean in fitted]) if len(fitted) > 1 else (fitted[0][0], fitted[0][1])
    aims = torch.cat([_aim(zr, chosen, mix) for chosen in targets], -1)
    changes = solve(zz, aims, penalty).chunk(len(targets), -1)
    found = []
    for chosen, w in zip(targets, changes, strict=True):
        few = list(chosen)
        found.append(error(held_out[0], _aim(held_out[1], chosen, mix), float(held_out[2][few][:, few].sum()), w))
    return found


def token_weights(
    stream: Tensor, counted: Tensor | None = None, real: Tensor | None = None, share: float = 0.1
) -> Tensor:
    """The weight of each token in a fit, [B, T] from the stream [B, T, D]; a window's sum to its number of tokens.

    `counted` [B, T] bool: tokens that count; others have weight 0, except attention sinks, which the counted tokens
    attend to, and a window's weights sum to its counted tokens.  `real` [B, T]: 0 at padding, which has weight 0 and
    is no part of a median.  The weight is the inverse square of the stream's norm, since a norm follows, so that
    errors are relative.  Attention sinks (the first real token, and any with 4 times the window's median norm) have
    huge norms and are few, but all later tokens attend to them: together they weigh `share`.  Without it a fit may
    break them (measured: perplexity 3.0 times dense instead of 1.4, in LOG.md).
    """
    size = stream.float().norm(dim=-1)
    inside = torch.ones_like(size, dtype=torch.bool) if real is None else real.to(size.device).bool()
    median = size.masked_fill(~inside, torch.nan).nanmedian(-1, keepdim=True).values
    sink = inside & ((size > 4 * median) | (inside.cumsum(-1) == 1))
    least = (1e-3 * median).clamp_min(1e-15)  # a token without an embedding may start at zero
    inverse = size.maximum(least).square().reciprocal()
    weights = torch.zeros_like(size)
    counts = inside if counted is None else inside & counted.to(inside.device)
    total = counts.to(size).sum(-1, keepdim=True)
    for chosen, part in ((counts & ~sink, 1 - share), (sink, share)):
        some = torch.where(chosen, inverse, 0.0)
        weights += part * total * some / some.sum(-1, keepdim=True).clamp_min(1e-30)
    return weights
