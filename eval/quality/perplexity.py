"""Perplexity over fixed windows, and the KL divergence of a pruned model from the dense one.

Windows are rows of token ids [N, T]. Each is read alone, without padding and without a token put before it,
so the first token of a window is context and T - 1 tokens are scored. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """exp(nll): nll in nats a token, its standard error over windows (None for one window), tokens scored."""

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
    """Mean KL(dense || pruned) in nats a token, its standard error over windows (None for one window), and how often
    the first choices agree (0 to 1)."""

    value: float
    stderr: float | None
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return f"{plus_minus(self.value, self.stderr, 4)} nats, same first choice {self.agreement:.1%}"


@dataclass(frozen=True)
class SideBySide:
    """What `side_by_side` measures in one pass; losses: nats of each scored token [N, T - 1] of dense and pruned."""

    dense: Perplexity
    pruned: Perplexity
    divergence: Divergence
    losses: tuple[Tensor, Tensor]


def perplexity(model: PreTrainedModel, windows: Tensor) -> Perplexity:
    """Perplexity of a causal LM over windows [N, T] of token ids.

    Raises EvaluationError when there is no window, or when windows hold fewer than two tokens.
    """
    return _perplexity(token_losses(model, windows))


def token_losses(model: PreTrainedModel, windows: Tensor, every: int = 1) -> Tensor:
    """Negative log-likelihood in nats of each `every`-th scored token, [N, ceil((T - 1) / every)] float64.

    The trunk reads whole windows; the head, most of a small model's time, only those positions.
    """
    windows, split = _checked(windows), SplitModel(model)
    rows = []
    with torch.inference_mode():
        for window in windows:
            hidden, targets = _hidden(split, window)[:-1:every], window[1::every]
            rows.append(torch.cat([_losses(split, hidden[piece], targets[piece]) for piece in split.pieces(hidden)]))
    return torch.stack(rows)


def side_by_side(dense: PreTrainedModel, pruned: PreTrainedModel, windows: Tensor) -> SideBySide:
    """`all_side_by_side` for one pruned model."""
    return all_side_by_side(dense, [pruned], windows)[0]


def all_side_by_side(dense: PreTrainedModel, pruned: Sequence[PreTrainedModel], windows: Tensor) -> list[SideBySide]:
    """Perplexities, and the divergence of each pruned model from the dense one, in one pass over windows [N, T].

    The dense model's logits are computed once, a bounded piece at a time.  Raises EvaluationError when the models
    do not share a vocabulary, or the windows cannot be used.
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
        rows = [_compare(one, others, window) for window in windows]
    left, right = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows], dim=1)
    return [_side(left, *each.unbind(-1)) for each in right]


def _side(dense: Tensor, pruned: Tensor, kl: Tensor, same: Tensor) -> SideBySide:
    """From losses, divergences and equal first choices of every token, [N, T] each; the last token has no target."""
    losses = dense[:, :-1], pruned[:, :-1]
    divergence = Divergence(
        value=float(kl.mean()), stderr=_stderr(kl.mean(1)), agreement=float(same.mean()), tokens=kl.numel()
    )
    return SideBySide(*map(_perplexity, losses), divergence, losses)


def _compare(one: SplitModel, others: Sequence[SplitModel], window: Tensor) -> tuple[Tensor, Tensor]:
    """One window [T]: the dense losses [T], and for each other model loss, KL and equal first choice [K, T, 3].

    With logits a and b, KL(p || q) = sum p (a - b) - log sum exp a + log sum exp b: three passes over the vocabulary
    where two log-softmaxes would take eight.
    """
    left, rights = _hidden(one, window), [_hidden(other, window) for other in others]
    targets = torch.cat([window[1:], window[:1]])
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


def _losses(split: SplitModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Loss of each target [n] after hidden states [n, D], in float64."""
    logits = split.logits(hidden)
    return (logits.logsumexp(-1) - _picked(logits, targets)).double().cpu()


def _hidden(split: SplitModel, window: Tensor) -> Tensor:
    """Hidden states [T, D] of one window [T]."""
    return split.hidden(window.unsqueeze(0).to(split.device), use_cache=False).last_hidden_state[0]


def _perplexity(losses: Tensor) -> Perplexity:
    """From the loss of each scored token, [N, S] in nats."""
    nll = float(losses.mean())
    if not math.isfinite(nll):
        raise EvaluationError("the log-likelihoods are not finite: hidden states overflow; try --dtype float32")
    value = math.exp(nll) if nll < 700 else math.inf
    return Perplexity(value=value, nll=nll, stderr=_stderr(losses.mean(1)), tokens=losses.numel())


def _stderr(values: Tensor) -> float | None:
    """Standard error of the mean of [N] window means; None for one window, which has no spread."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def _checked(windows: Tensor) -> Tensor:
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise EvaluationError(
            f"windows have the shape {list(windows.shape)}; perplexity needs token ids [N, T], N >= 1 and "
            "T >= 2: take a longer text or a shorter window"
        )
    return windows
