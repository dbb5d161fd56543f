"""Acceptance of a draft that reads the dense model's cache, on what the dense model writes at places of a text.

At each place the dense model writes a few tokens, greedily or sampled, as it does in decoding; the draft reads them
behind the dense model's cache of what came before, and its distribution q of each following token is held against the
dense model's p.  A token drawn from q is accepted with probability sum over the vocabulary of min(p, q)
(arXiv 2211.17192, corollary 3.6).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from dropformer.metrics.calibration.windows import Windows
from dropformer.prune.discovery.replay import evaluating
from dropformer.prune.draft.shared_cache import recording_cache, view_of
from dropformer.prune.errors import CalibrationError
from dropformer.prune.loading.device import input_device

DEPTH = 16  # tokens that the dense model writes behind each place, the one there included


@dataclass(frozen=True)
class Rounds:
    """Expected numbers of rounds, of accepted tokens, and of judged ones: accepted, or the first that is rejected."""

    count: float
    accepted: float
    judged: float

    @property
    def acceptance(self) -> float:
        return self.accepted / self.judged

    @property
    def tokens(self) -> float:
        """Of a round; one is the dense model's own."""
        return 1 + self.accepted / self.count


@dataclass(frozen=True)
class Acceptance:
    """A number for each window, place and depth.  overlap, agreement: [N, P, G] float64; places: [P].

    overlap: sum of min(p, q) at `temperature` (1 where that is 0); agreement: 1 where both are greatest at one token;
    domain: the text of each window.  Depth 0 is the token after the place, whose past is all verified.  The tokens at
    the places are the text's, all behind them the dense model's own.
    """

    overlap: Tensor
    agreement: Tensor
    places: Tensor
    domains: tuple[str, ...]
    temperature: float = 1.0

    @property
    def accepted(self) -> Tensor:
        """The probability that each token is accepted, [N, P, G]."""
        return self.overlap if self.temperature else self.agreement

    @property
    def mean(self) -> float:
        return float(self.accepted.mean())

    def rounds(self, drafted: int) -> Rounds:
        """What rounds of `drafted` tokens over all that the dense model wrote are expected to give.

        A round ends at the first rejection, and the next one begins behind it, where the text is hard: acceptance comes
        in stretches.  Example, acceptance 1, 0, 1, 1, 1 and two drafted: a round accepts 1 of 2 judged, the next one
        begins at the third token and accepts 2 of 2; the fifth token, the last, is the dense model's.
        """
        chances = self.accepted
        last = chances.shape[-1] - 1  # nothing is drafted for the last token
        begun = chances.new_zeros(*chances.shape[:2], last + drafted + 2)  # probability that a round begins here
        begun[..., 0] = 1
        found = torch.zeros(3, dtype=torch.float64)
        for start in range(last):
            alive = begun[..., start]
            found[0] += alive.sum()
            end = min(start + drafted, last)
            for token in range(start, end):
                found[2] += alive.sum()
                begun[..., token + 1] += alive * (1 - chances[..., token])
                alive = alive * chances[..., token]
                found[1] += alive.sum()
            begun[..., end + 1] += alive
        return Rounds(*found.tolist())

    @property
    def by_domain(self) -> dict[str, float]:
        rows = {name: [i for i, own in enumerate(self.domains) if own == name] for name in self.domains}
        return {name: float(self.accepted[which].mean()) for name, which in rows.items()}

    @property
    def by_position(self) -> dict[int, float]:
        return {int(place): float(self.accepted[:, i].mean()) for i, place in enumerate(self.places)}

    @property
    def by_depth(self) -> list[float]:
        return [float(column) for column in self.accepted.mean((0, 1))]


class DenseText:
    """The dense model's cache and its distributions at some places of each window, which every draft is held against.

    Time: a forward pass over the windows and N P G decode steps.  Memory: their KV cache, and N P G V numbers in half
    precision.  Raises CalibrationError for windows too short for the places.
    """

    def __init__(
        self, model: PreTrainedModel, data: Sequence[Windows], places: Sequence[int], temperature: float = 1.0
    ) -> None:
        self.model, self.temperature, self.places = model, temperature, list(places)
        self.domains = tuple(windows.ref.name for windows in data for _ in range(len(windows)))
        device = input_device(model)
        self.rows = [
            row[None, :length].to(device)  # without padding
            for windows in data
            for row, length in zip(windows.ids, windows.lengths(), strict=True)
        ]
        if (length := shortest(data)) <= max(self.places):
            raise CalibrationError(f"windows of {length} tokens end before {max(self.places) + 1}; give longer texts")
        self.dice = torch.Generator().manual_seed(0)
        with torch.inference_mode(), evaluating(model):
            self.kept = [self._read(row) for row in self.rows]

    def _read(self, row: Tensor) -> tuple[Cache, Tensor, Tensor]:
        """Cache [of T tokens], and at each place what the dense model writes: tokens [P, G], log-probabilities
        [P, G, V] of those that follow them."""
        cache = recording_cache(self.model)
        self.model(input_ids=row, past_key_values=cache, use_cache=True, logits_to_keep=1)
        written = [self._write(shortened(cache, place), row[:, place : place + 1]) for place in self.places]
        return cache, torch.cat([ids for ids, _ in written]), torch.stack([found for _, found in written])

    def _write(self, cache: Cache, token: Tensor) -> tuple[Tensor, Tensor]:
        """`token` [1, 1] and what follows it, [1, G], and log-probabilities [G, V] of what follows each."""
        ids, found = [token], []
        for _ in range(DEPTH):
            output = self.model(input_ids=ids[-1], past_key_values=cache, use_cache=True)
            found.append(self._log_probs(output.logits[0, -1]))
            following = found[-1].argmax(-1) if not self.temperature else self._drawn(found[-1])
            ids.append(following.view(1, 1))
        return torch.cat(ids[:-1], dim=1), torch.stack(found).half()

    def _drawn(self, log_probs: Tensor) -> Tensor:
        return torch.multinomial(log_probs.exp().cpu(), 1, generator=self.dice).to(log_probs.device)

    def _log_probs(self, logits: Tensor) -> Tensor:
        return (logits.float() / (self.temperature or 1.0)).log_softmax(-1)

    def acceptance(self, draft: PreTrainedModel, sources: Sequence[int]) -> Acceptance:
        """How often the draft is accepted.  sources: as `view_of` takes them.  Time: N P draft passes of G tokens."""
        overlap, agreement = [], []
        with torch.inference_mode(), evaluating(draft):
            for cache, ids, dense in self.kept:
                for place, new, p in zip(self.places, ids, dense, strict=True):
                    view = view_of(shortened(cache, place), draft, sources)
                    q = self._log_probs(draft(input_ids=new[None], past_key_values=view, use_cache=True).logits[0])
                    overlap.append(torch.minimum(p.float(), q).exp().sum(-1).clamp_max(1).double().cpu())
                    agreement.append((p.argmax(-1) == q.argmax(-1)).double().cpu())
        shape = (len(self.rows), len(self.places), DEPTH)
        both = [torch.stack(found).view(shape) for found in (overlap, agreement)]
        return Acceptance(both[0], both[1], torch.tensor(self.places), self.domains, self.temperature)


def shortened(cache: Cache, length: int) -> Cache:
    """A cache of its first `length` tokens, which shares the tensors: every token must still be there."""
    made = copy.copy(cache)
    made.layers = [copy.copy(entry) for entry in cache.layers]
    entry: Any
    for entry in made.layers:
        if getattr(entry, "keys", None) is None or not entry.is_initialized:  # holds nothing
            continue
        first = 0
        if isinstance(entry, DynamicSlidingWindowLayer):
            first, entry.cumulative_length = max(0, length - entry.sliding_window + 1), length
        entry.keys, entry.values = entry.keys[..., first:length, :], entry.values[..., first:length, :]
    return made


def shortest(data: Sequence[Windows]) -> int:
    """Tokens in the shortest window, without padding."""
    return min(length for windows in data for length in windows.lengths())


def spread(length: int, count: int, first: int) -> list[int]:
    """`count` places from `first` to the end of a window, evenly: 4 of 100 from 20 are 20, 44, 69, 94."""
    last = max(first, length - DEPTH)
    return sorted({round(first + (last - first) * i / max(1, count - 1)) for i in range(count)})
