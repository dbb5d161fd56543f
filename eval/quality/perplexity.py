"""Perplexity over fixed windows, and the KL divergence of a pruned model from the dense one.

Windows are rows of token ids [N, T], several at a time where that is faster.  Each is read without a token put
before it, so the first token of a window is context and T - 1 tokens are scored. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dropformer.eval.quality.head import SplitModel
from dropformer.metrics.calibration.batching import Fitting, windows_at_once
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.windows import alike, by_length, computed_tokens
from dropformer.prune.errors import EvaluationError

HELD_OUT = Calibration("heldout", samples=8, length=512, seed=1)
"""The windows on which `prune` and `prune evaluate` measure perplexity unless told otherwise."""

Result = TypeVar("Result")


def plus_minus(value: float, stderr: float | None, digits: int) -> str:
    """`1.234 ± 0.056`; without the ± where one window has no spread to tell."""
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


@dataclass(frozen=True)
class Perplexity:
    """exp(nll): nll in nats per token, its standard error over windows (None for one window), tokens scored."""

    value: float
    nll: float
    stderr: float | None
    tokens: int

    @property
    def value_stderr(self) -> float | None:
        """Standard error of `value` by the delta method; None for one window."""
        return None if self.stderr is None else self.value * self.stderr

    def __str__(self) -> str:
        return plus_minus(self.value, self.value_stderr, 3)


@dataclass(frozen=True)
class Divergence:
    """Mean KL(dense || pruned) in nats per token, its standard error over windows (None for one window), and how often
    the first choices agree (0 to 1)."""

    value: float
    stderr: float | None
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return f"{plus_minus(self.value, self.stderr, 4)} nats, same first choice {self.agreement:.1%}"


@dataclass(frozen=True)
class SideBySide:
    """What `side_by_side` measures in one pass; losses: nats of each window's scored tokens, of dense and pruned."""

    dense: Perplexity
    pruned: Perplexity
    divergence: Divergence
    losses: tuple[list[Tensor], list[Tensor]]

    @property
    def ratio_stderr(self) -> float | None:
        """Standard error of pruned over dense perplexity, the windows paired; None for one window."""
        sums = torch.stack([(b - a).sum() for a, b in zip(*self.losses, strict=True)])
        counts = torch.tensor([float(len(a)) for a in self.losses[0]], dtype=torch.float64)
        stderr = _stderr(sums, counts)
        return None if stderr is None else self.pruned.value / self.dense.value * stderr


def perplexity(model: PreTrainedModel, windows: Tensor, scored: Tensor | None = None) -> Perplexity:
    """Perplexity of a causal LM over windows [N, T] of token ids; of tokens [N, T] that are scored (None: all).

    Raises EvaluationError when there is no window, or when windows hold fewer than two tokens.
    """
    return _perplexity(token_losses(model, windows, scored=scored))


def token_losses(model: PreTrainedModel, windows: Tensor, every: int = 1, scored: Tensor | None = None) -> list[Tensor]:
    """Negative log-likelihood in nats of each `every`-th scored token of each window [N, T], in float64.

    The trunk reads whole windows; the head, most of a small model's time, only those positions.
    """
    windows, split = _checked(windows), SplitModel(model)
    with torch.inference_mode():
        return _in_batches([model], windows, lambda rows: _batch_losses(split, windows, scored, rows, every), scored)


def _batch_losses(
    split: SplitModel, windows: Tensor, scored: Tensor | None, rows: Sequence[int], every: int
) -> list[Tensor]:
    """The losses of some windows; one transfer for all of them."""
    ids, counts = _cut(windows, scored, rows)
    counts &= (counts.cumsum(1) - 1) % every == 0
    ids = ids.to(split.device)
    hidden = _hidden(split, ids)
    hidden, targets = hidden[:, :-1][counts.to(hidden.device)], ids[:, 1:][counts.to(ids.device)].to(hidden.device)
    found = torch.cat([losses_of(split, hidden[piece], targets[piece]) for piece in split.pieces(hidden)])
    return list(found.cpu().double().split(counts.sum(1).tolist()))


def side_by_side(
    dense: PreTrainedModel, pruned: PreTrainedModel, windows: Tensor, scored: Tensor | None = None
) -> SideBySide:
    """`all_side_by_side` for one pruned model."""
    return all_side_by_side(dense, [pruned], windows, scored)[0]


def all_side_by_side(
    dense: PreTrainedModel, pruned: Sequence[PreTrainedModel], windows: Tensor, scored: Tensor | None = None
) -> list[SideBySide]:
    """Perplexities, and the divergence of each pruned model from the dense one, in one pass over windows [N, T].

    The dense model's logits are computed once, a bounded piece at a time.  With `scored` [N, T] only the predictions
    of these tokens count, for the divergence too.  Raises EvaluationError when the models do not share a vocabulary,
    or the windows cannot be used.
    """
    windows = _checked(windows)
    one, others = SplitModel(dense), [SplitModel(model) for model in pruned]
    for other in others:
        if one.vocabulary != other.vocabulary:
            raise EvaluationError(
                f"the dense model has {one.vocabulary} tokens and the pruned one {other.vocabulary}; "
                "KL divergence needs one vocabulary: compare a model with its own pruned form"
            )
    with torch.inference_mode():
        rows = _in_batches([dense, *pruned], windows, lambda rows: _compare(one, others, windows, scored, rows), scored)
    end = None if scored is not None else -1  # the last position's choice is compared, not scored
    left = [losses[:end] for losses, _ in rows]
    return [_side(left, [table[k] for _, table in rows], end) for k in range(len(others))]


def _side(dense: list[Tensor], tables: list[Tensor], end: int | None) -> SideBySide:
    """From the dense losses, and loss, KL and equal first choice of every token [n, 3], of each window."""
    losses = dense, [table[:end, 0] for table in tables]
    compared = torch.tensor([len(table) for table in tables], dtype=torch.float64)
    _, kl, same = torch.stack([table.sum(0) for table in tables]).unbind(1)
    divergence = Divergence(
        value=float(kl.sum() / compared.sum()),
        stderr=_stderr(kl, compared),
        agreement=float(same.sum() / compared.sum()),
        tokens=int(compared.sum()),
    )
    return SideBySide(_perplexity(losses[0]), _perplexity(losses[1]), divergence, losses)


def _in_batches(
    models: Sequence[PreTrainedModel],
    windows: Tensor,
    run: Callable[[Sequence[int]], list[Result]],
    scored: Tensor | None,
) -> list[Result]:
    """What `run` gives for every window, as many at once as all models' device takes, like lengths together."""
    lengths = _lengths(windows, scored)
    order = by_length(lengths)
    size = min(windows_at_once(model, windows.shape[1]) for model in models)
    fitting = Fitting(run)
    parts = [part for rows in alike([lengths[i] for i in order], size) for part in fitting(order[rows])]
    found = dict(zip(order, (each for part in parts for each in part), strict=True))
    return [found[i] for i in range(len(order))]


def _lengths(windows: Tensor, scored: Tensor | None) -> list[int]:
    """How far each window is read: to its last scored token, those of the whole length where all are."""
    if scored is None:
        return [windows.shape[1]] * len(windows)
    return (scored * torch.arange(1, scored.shape[1] + 1)).amax(1).tolist()


def tokens_read(model: PreTrainedModel, windows: Tensor, scored: Tensor | None) -> str:
    """`, 24 tokens computed for 22 needed`; "" where windows are of one length."""
    lengths = _lengths(windows, scored)
    if len(set(lengths)) == 1:
        return ""
    computed = computed_tokens(lengths, windows_at_once(model, windows.shape[1]))
    return f", {computed:,} tokens computed for {sum(lengths):,} needed"


def _cut(windows: Tensor, scored: Tensor | None, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Some windows [B, t] up to their last scored token, and which of their tokens but the first are, [B, t - 1].

    A shorter one is run to the end of the longest: no token sees those behind it.
    """
    ids = windows[list(rows)]
    if scored is None:
        return ids, torch.ones_like(ids[:, 1:], dtype=torch.bool)
    counts = scored[list(rows)]
    end = int(counts.any(0).nonzero().max()) + 1
    return ids[:, :end], counts[:, 1:end].clone()


def _compare(
    one: SplitModel, others: Sequence[SplitModel], windows: Tensor, scored: Tensor | None, rows: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Each of some windows [T]: the dense losses [T], and for each other model loss, KL and equal first choice
    [K, T, 3].

    With logits a and b, KL(p || q) = sum p (a - b) - log sum exp a + log sum exp b: three passes over the vocabulary
    where two log-softmaxes would take eight.  scored [N, T]: which tokens count, the first never; None: all, and KL
    at the last position too.  Figures stay on the device until all of the batch's are there.
    """
    ids, counts = _cut(windows, scored, rows)
    ids, every = ids.to(one.device), scored is None
    chosen = torch.ones_like(ids, dtype=torch.bool, device="cpu")
    if not every:
        chosen[:, :-1], chosen[:, -1] = counts, False
    left, *rights = [_hidden(split, ids) for split in (one, *others)]
    left, *rights = [hidden[chosen.to(hidden.device)] for hidden in (left, *rights)]
    targets = ids.roll(-1, 1)[chosen.to(ids.device)].to(left.device)
    found = [_piece(one, others, piece, left, rights, targets) for piece in one.pieces(left)]
    losses, table = (torch.cat(parts, dim=-1).cpu().double() for parts in zip(*found, strict=True))
    sizes = chosen.sum(1).tolist()
    each = zip(losses.split(sizes), table.split(sizes, dim=-1), strict=True)
    return [(loss, figures.transpose(1, 2)) for loss, figures in each]


def _piece(
    one: SplitModel, others: Sequence[SplitModel], piece: slice, left: Tensor, rights: Sequence[Tensor], targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Some positions [n]: the dense losses [n], and loss, KL and equal first choice of each other model [K, 3, n]."""
    a = one.logits(left[piece])
    total, first = a.logsumexp(-1, keepdim=True), a.argmax(-1)
    dense = total[:, 0] - _picked(a, targets[piece])
    p = (a - total).exp_()
    columns = []
    for other, right in zip(others, rights, strict=True):
        b = other.logits(right[piece]).to(a.device)
        other_total, same = b.logsumexp(-1), b.argmax(-1) == first
        loss = other_total - _picked(b, targets[piece])
        kl = torch.einsum("nv,nv->n", p, b.neg_().add_(a)) - total[:, 0] + other_total
        columns.append(torch.stack([loss, kl, same.float()]))
    return dense, torch.stack(columns)


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    """The logit [n] of each target [n] among logits [n, V]."""
    return logits.gather(1, targets[:, None].to(logits.device)).squeeze(1)


def losses_of(split: SplitModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Loss of each target [n] after hidden states [n, D], on their device."""
    logits = split.logits(hidden)
    return logits.logsumexp(-1) - _picked(logits, targets)


def _hidden(split: SplitModel, ids: Tensor) -> Tensor:
    """Hidden states [B, T, D] of windows [B, T]."""
    return split.hidden(ids, use_cache=False).last_hidden_state


def _perplexity(losses: list[Tensor]) -> Perplexity:
    """From the losses of each window's scored tokens, in nats."""
    sums, scored = torch.stack([each.sum() for each in losses]), torch.tensor([float(len(each)) for each in losses])
    scored = scored.double()
    nll = float(sums.sum() / scored.sum())
    if not math.isfinite(nll):
        raise EvaluationError("the log-likelihoods are not finite: hidden states overflow; try --dtype float32")
    value = math.exp(nll) if nll < 700 else math.inf
    return Perplexity(value=value, nll=nll, stderr=_stderr(sums, scored), tokens=int(scored.sum()))


def _stderr(sums: Tensor, counts: Tensor) -> float | None:
    """Standard error of sum(sums) / sum(counts) over windows, [N] each; None for one window, which has no spread.

    Windows may differ in length: a ratio of totals (Cochran, Sampling Techniques, 1977, chapter 6).
    """
    n = len(sums)
    if n < 2:
        return None
    apart = sums - counts * (sums.sum() / counts.sum())
    return float((apart.square().sum() / (n - 1) / n).sqrt() / counts.mean())


def _checked(windows: Tensor) -> Tensor:
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise EvaluationError(
            f"windows have the shape {list(windows.shape)}; perplexity needs token ids [N, T], N >= 1 and "
            "T >= 2: take a longer text or a shorter window"
        )
    return windows
