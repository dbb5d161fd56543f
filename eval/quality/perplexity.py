"""Perplexity over fixed windows, and the KL divergence of a pruned model from the dense one.

Windows are rows of token ids [N, T]. Each is read alone, without padding and without a token put before it,
so the first token of a window is context and T - 1 tokens are scored. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dropformer.eval.quality.head import SplitModel
from dropformer.metrics.calibration.settings import Calibration
from dropformer.prune.errors import EvaluationError

HELD_OUT = Calibration("heldout", samples=8, length=512, seed=1)
"""The windows on which `prune` and `prune evaluate` measure perplexity unless told otherwise."""


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
    windows, split, found = _checked(windows), SplitModel(model), []
    with torch.inference_mode():
        for window, counts in _rows(windows, scored):
            hidden, targets = _hidden(split, window)[:-1][counts][::every], window[1:][counts][::every]
            found.append(torch.cat([losses_of(split, hidden[piece], targets[piece]) for piece in split.pieces(hidden)]))
    return found


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
        rows = [_compare(one, others, window, None if scored is None else c) for window, c in _rows(windows, scored)]
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


def _rows(windows: Tensor, scored: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Each window [t] up to its last scored token, and which of its tokens but the first are scored, [t - 1]."""
    for i, window in enumerate(windows):
        if scored is None:
            yield window, torch.ones(len(window) - 1, dtype=torch.bool)
        else:
            end = int(scored[i].nonzero().max()) + 1
            yield window[:end], scored[i, 1:end]


def _compare(
    one: SplitModel, others: Sequence[SplitModel], window: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One window [T]: the dense losses [T], and for each other model loss, KL and equal first choice [K, T, 3].

    With logits a and b, KL(p || q) = sum p (a - b) - log sum exp a + log sum exp b: three passes over the vocabulary
    where two log-softmaxes would take eight.  counts [T - 1]: which tokens but the first are scored; None: all, and KL
    at the last position too.
    """
    left, rights = _hidden(one, window), [_hidden(other, window) for other in others]
    targets = torch.cat([window[1:], window[:1]])
    if counts is not None:
        left, rights, targets = left[:-1][counts], [right[:-1][counts] for right in rights], window[1:][counts]
    losses, rows = [], []
    for piece in one.pieces(left):
        a = one.logits(left[piece])
        total, first = a.logsumexp(-1, keepdim=True), a.argmax(-1)
        losses.append(total[:, 0] - _picked(a, targets[piece]))
        p = (a - total).exp_()
        columns = []
        for other, right in zip(others, rights, strict=True):
            b = other.logits(right[piece]).to(a.device)
            other_total, same = b.logsumexp(-1), b.argmax(-1) == first
            loss = other_total - _picked(b, targets[piece])
            kl = torch.einsum("nv,nv->n", p, b.neg_().add_(a)) - total[:, 0] + other_total
            columns.append(torch.stack([loss, kl, same.float()], dim=-1).double().cpu())
        rows.append(torch.stack(columns))
    return torch.cat(losses).double().cpu(), torch.cat(rows, dim=1)


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    """The logit [n] of each target [n] among logits [n, V]."""
    return logits.gather(1, targets[:, None].to(logits.device)).squeeze(1)


def losses_of(split: SplitModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Loss of each target [n] after hidden states [n, D], in float64."""
    logits = split.logits(hidden)
    return (logits.logsumexp(-1) - _picked(logits, targets)).double().cpu()


def _hidden(split: SplitModel, window: Tensor) -> Tensor:
    """Hidden states [T, D] of one window [T]."""
    return split.hidden(window.unsqueeze(0).to(split.device), use_cache=False).last_hidden_state[0]


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
