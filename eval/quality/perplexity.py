"""Perplexity over fixed windows, and the KL divergence of a pruned model from the dense one.

Windows are rows of token ids [N, T]. Each is read alone, without padding and without a token put before it,
so the first token of a window is context and T - 1 tokens are scored. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dropformer.eval.quality.head import SplitModel
from dropformer.prune.errors import EvaluationError


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
    """What `side_by_side` measures in one pass."""

    dense: Perplexity
    pruned: Perplexity
    divergence: Divergence


def perplexity(model: PreTrainedModel, windows: Tensor, scored: Tensor | None = None) -> Perplexity:
    """Perplexity of a causal LM over windows [N, T] of token ids; of tokens [N, T] that are scored (None: all).

    Raises EvaluationError when there is no window, or when windows hold fewer than two tokens.
    """
    windows = _checked(windows)
    split = SplitModel(model)
    sums = torch.zeros(len(windows), dtype=torch.float64)
    with torch.inference_mode():
        for i, (window, counts) in enumerate(_rows(windows, scored)):
            hidden, targets = _hidden(split, window)[:-1][counts], window[1:][counts]
            for piece in split.pieces(hidden):
                sums[i] += _nll(split.logits(hidden[piece]), targets[piece])
    return _perplexity(sums, _counted(windows, scored))


def kl_to(dense: PreTrainedModel, pruned: PreTrainedModel, windows: Tensor) -> Divergence:
    """Mean KL(dense || pruned) a token over windows [N, T], both models forward window by window.

    Raises EvaluationError when the two do not share a vocabulary, or the windows cannot be used.
    """
    return side_by_side(dense, pruned, windows).divergence


def side_by_side(
    dense: PreTrainedModel, pruned: PreTrainedModel, windows: Tensor, scored: Tensor | None = None
) -> SideBySide:
    """Both perplexities and the divergence between them, in one pass over windows [N, T].

    With `scored` [N, T] only the predictions of these tokens count, for the divergence too.
    Raises EvaluationError as `kl_to` does.
    """
    windows = _checked(windows)
    one, two = SplitModel(dense), SplitModel(pruned)
    if one.vocabulary != two.vocabulary:
        raise EvaluationError(
            f"the dense model has {one.vocabulary} tokens and the pruned one {two.vocabulary}; "
            "KL divergence needs one vocabulary: compare a model with its own pruned form"
        )
    rows = torch.zeros(len(windows), 4, dtype=torch.float64)
    with torch.inference_mode():
        for i, (window, counts) in enumerate(_rows(windows, scored)):
            rows[i] = _compare(one, two, window, None if scored is None else counts)
    nll_dense, nll_pruned, kl, agree = rows.T
    counted = _counted(windows, scored)
    compared = counted if scored is not None else counted + 1  # the last position's choice is compared, not scored
    return SideBySide(
        dense=_perplexity(nll_dense, counted),
        pruned=_perplexity(nll_pruned, counted),
        divergence=Divergence(
            value=float(kl.sum() / compared.sum()),
            stderr=_stderr(kl, compared),
            agreement=float(agree.sum() / compared.sum()),
            tokens=int(compared.sum()),
        ),
    )


def _rows(windows: Tensor, scored: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Each window [t] up to its last scored token, and which of its tokens but the first are scored, [t - 1]."""
    for i, window in enumerate(windows):
        if scored is None:
            yield window, torch.ones(len(window) - 1, dtype=torch.bool)
        else:
            end = int(scored[i].nonzero().max()) + 1
            yield window[:end], scored[i, 1:end]


def _counted(windows: Tensor, scored: Tensor | None) -> Tensor:
    """How many predictions each window scores, [N] float64."""
    if scored is None:
        return torch.full((len(windows),), windows.shape[1] - 1, dtype=torch.float64)
    return scored[:, 1:].sum(1).double()


def _compare(one: SplitModel, two: SplitModel, window: Tensor, counts: Tensor | None) -> Tensor:
    """Sums over one window [T]: nll dense, nll pruned, KL(dense || pruned), equal first choices.

    `counts` [T - 1]: which tokens but the first are scored; None: all, and KL at the last position too.
    """
    left, right = _hidden(one, window), _hidden(two, window)
    targets = torch.cat([window[1:], window[:1]])
    scored = torch.arange(len(window)) < len(window) - 1
    if counts is not None:
        left, right, targets = left[:-1][counts], right[:-1][counts], window[1:][counts]
        scored = torch.ones(len(targets), dtype=torch.bool)
    sums = torch.zeros(4, dtype=torch.float64)
    for piece in one.pieces(left):
        p = F.log_softmax(one.logits(left[piece]), dim=-1)
        q = F.log_softmax(two.logits(right[piece]).to(p.device), dim=-1)
        for column, scores in enumerate((p, q)):
            picked = scores.gather(1, targets[piece, None].to(p.device)).squeeze(1).cpu()
            sums[column] -= float(picked[scored[piece]].double().sum())
        sums[2] += float((p.exp() * (p - q)).sum(-1).double().sum())
        sums[3] += float((p.argmax(-1) == q.argmax(-1)).sum())
    return sums


def _hidden(split: SplitModel, window: Tensor) -> Tensor:
    """Hidden states [T, D] of one window [T]."""
    return split.hidden(window.unsqueeze(0).to(split.device), use_cache=False).last_hidden_state[0]


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Summed negative log-likelihood of targets [n] under float32 logits [n, V], in float64."""
    return float(F.cross_entropy(logits, targets.to(logits.device), reduction="none").double().sum())


def _perplexity(sums: Tensor, scored: Tensor) -> Perplexity:
    """From each window's summed nll [N] and the tokens scored in each, [N] float64."""
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
