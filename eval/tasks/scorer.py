"""Log-probabilities of given next tokens, packed: prefixes computed once, rows without padding.

`packing` plans the forward passes. A row is one sequence of the batch with a 4D attention mask (each token attends to
the cached trunk and its own ancestors) and explicit positions. Not every architecture supports such a mask, so it is
tested on the model itself first; other models run batches padded on the right, which causal attention ignores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from dropformer.eval.quality.head import SplitModel
from dropformer.eval.tasks.packing import Limits, Packed, Query, Trunk, pack, plan
from dropformer.eval.tasks.prefix_cache import expanded
from dropformer.prune.errors import reason

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreRequest:
    """The last len(targets) positions of sequence `tokens`, and the target token after each."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Summed log-probability of the targets in nats, and whether each is the most probable token."""

    logprob: float
    greedy: bool


@dataclass
class Stats:
    """Counts. `needed`: tokens of the distinct sequences, without padding or sharing; `computed`: tokens that ran
    through the model; `logits`: positions that ran through the output head."""

    requests: int = 0
    sequences: int = 0
    needed: int = 0
    computed: int = 0
    logits: int = 0
    forwards: int = 0


@dataclass
class _Asked:
    """One distinct sequence and all requests for it: (index of the request, its targets)."""

    query: Query
    wants: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)


class Scorer:
    """Scores requests with `model`. `packs`: whether rows are packed; `why_not`: the reason if not."""

    def __init__(self, model: PreTrainedModel, limits: Limits | None = None, pack: bool = True) -> None:
        self.split = SplitModel(model)
        self.device: torch.device = self.split.device
        self.limits = limits or Limits(tokens=512 if self.device.type == "cpu" else 2048)
        self.stats = Stats()
        self.longest = _longest_packed(model)
        self.packs, self.why_not = False, "not asked for"
        if pack:
            self.packs, self.why_not = self._prove()
            if not self.packs:
                log.warning("scoring in padded batches: %s", self.why_not)

    @torch.inference_mode()
    def score(self, wants: Sequence[ScoreRequest], done: Callable[[int, Score], None] | None = None) -> list[Score]:
        """A score for each request, in order. `done` is called with each (index, score) once known."""
        scores: dict[int, Score] = {}

        def keep(index: int, score: Score) -> None:
            scores[index] = score
            if done is not None:
                done(index, score)

        asked = _distinct(wants)
        self.stats.requests += len(wants)
        self.stats.sequences += len(asked)
        self.stats.needed += sum(len(a.query.tokens) for a in asked)
        fit = [a for a in asked if self.packs and len(a.query.tokens) <= self.longest]
        rest = [a for a in asked if not self.packs or len(a.query.tokens) > self.longest]
        if self.packs and rest:
            log.warning("%d sequences are longer than %d tokens and run padded", len(rest), self.longest)
        self._trunk(plan([a.query for a in fit], self.limits), fit, None, keep)
        for batch in _padded_batches(rest, self.limits.tokens):
            self._batch(batch, keep)
        return [scores[i] for i in range(len(wants))]

    @torch.no_grad()
    def trunk_cache(self, tokens: Sequence[int]) -> Cache:
        """Keys and values of one sequence."""
        return self._forward(np.array(tokens), np.arange(len(tokens)), None, None, use_cache=True).past_key_values

    def _trunk(self, trunk: Trunk, asked: list[_Asked], cache: Cache | None, keep: Callable) -> None:
        """Extend the cache by the trunk's own tokens, then run its rows and inner trunks."""
        if trunk.stop > trunk.start:
            tokens = asked[trunk.example].query.tokens[trunk.start : trunk.stop]
            positions = np.arange(trunk.start, trunk.stop)
            out = self._forward(np.array(tokens), positions, None, cache, use_cache=True)
            cache = out.past_key_values
        for row in trunk.rows:
            self._row([asked[i] for i in row], trunk.stop, cache, keep)
        for inner in trunk.inner:
            self._trunk(inner, asked, cache, keep)

    def _row(self, row: list[_Asked], start: int, cache: Cache | None, keep: Callable) -> None:
        packed = pack([a.query for a in row], start)
        out = self._forward(packed.tokens, packed.positions, self._mask(packed, start), cache)
        self._read(out.last_hidden_state[0], list(zip(row, packed.asked, strict=True)), keep)

    def _batch(self, batch: list[_Asked], keep: Callable) -> None:
        """Sequences of similar length, padded on the right with their own first token."""
        width = max(len(a.query.tokens) for a in batch)
        ids = torch.tensor([[*a.query.tokens, *[a.query.tokens[0]] * width][:width] for a in batch])
        out = self.split.hidden(ids.to(self.device), use_cache=False)
        self.stats.computed += ids.numel()
        self.stats.forwards += 1
        places = [np.arange(a.query.first, len(a.query.tokens)) + i * width for i, a in enumerate(batch)]
        self._read(out.last_hidden_state.flatten(0, 1), list(zip(batch, places, strict=True)), keep)

    def _forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        mask: Tensor | None,
        cache: Cache | None,
        use_cache: bool = False,
    ):
        """One sequence of tokens [Q] at positions [Q] after a copy of `cache`."""
        self.stats.computed += len(tokens)
        self.stats.forwards += 1
        return self.split.hidden(
            torch.from_numpy(tokens).unsqueeze(0).to(self.device),
            position_ids=torch.from_numpy(positions).unsqueeze(0).to(self.device),
            attention_mask=mask,
            past_key_values=None if cache is None else expanded(cache, 1),
            use_cache=use_cache or cache is not None,
        )

    def _mask(self, packed: Packed, start: int) -> Tensor | None:
        """Additive mask [1, 1, Q, start + Q]: 0 where a token attends, the lowest number elsewhere."""
        if packed.is_chain:
            return None
        dtype, size = self.split.model.dtype, len(packed.tokens)
        mask = torch.zeros(1, 1, size, start + size, dtype=dtype, device=self.device)
        mask[..., start:].masked_fill_(~torch.from_numpy(packed.visible).to(self.device), torch.finfo(dtype).min)
        return mask

    def _read(self, hidden: Tensor, found: list[tuple[_Asked, np.ndarray]], keep: Callable) -> None:
        """Scores from hidden states [N, D], given the row indices of each sequence's queried positions."""
        places, inverse = np.unique(np.concatenate([p for _, p in found]), return_inverse=True)
        rows, targets, owners = _lookups(found, inverse)
        picked, best = self._look_up(hidden[torch.from_numpy(places).to(hidden.device)], rows, targets)
        sums, hits = np.zeros(len(owners)), np.ones(len(owners), bool)
        at = 0
        for n, (_, count) in enumerate(owners):
            sums[n] = picked[at : at + count].sum()
            hits[n] = (best[at : at + count] == targets[at : at + count]).all()
            at += count
        for (index, _), total, greedy in zip(owners, sums, hits, strict=True):
            keep(index, Score(float(total), bool(greedy)))

    def _look_up(self, hidden: Tensor, rows: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log p(target) (float64) and the most probable token, after each of hidden[rows] [M, D]."""
        self.stats.logits += len(hidden)
        picked, best = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
        for piece in self.split.pieces(hidden):
            here = np.flatnonzero((rows >= piece.start) & (rows < piece.stop))
            scores = self.split.logits(hidden[piece]).log_softmax(-1)
            at = torch.from_numpy(rows[here] - piece.start).to(scores.device)
            picked[here] = scores[at, torch.from_numpy(targets[here]).to(scores.device)].double().cpu()
            best[here] = scores.argmax(-1)[at].cpu()
        return picked, best

    @torch.inference_mode()
    def _prove(self) -> tuple[bool, str]:
        """Compare packed scores of a few synthetic sequences with those of each alone."""
        model = self.split.model
        if model.config._attn_implementation not in ("sdpa", "eager"):
            return False, f"{model.config._attn_implementation} attention takes no 4D mask"
        wants = _made_up(model.get_input_embeddings().weight.shape[0])
        if max(len(w.tokens) for w in wants) > self.longest:
            return False, f"the model attends only to the last {self.longest} tokens"
        limits, stats = self.limits, self.stats
        self.limits, self.stats = Limits(tokens=1000), Stats()
        try:
            alone = self.score(wants)  # packs is still False: padded
            for trial in (Limits(tokens=1000, shared=1000), Limits(tokens=14, shared=4)):
                self.limits, self.packs = trial, True
                worst = max(abs(a.logprob - b.logprob) for a, b in zip(alone, self.score(wants), strict=True))
                if worst > _allowed(model.dtype):
                    return False, f"packed log-likelihoods differ by {worst:.2g} from those of one sequence"
            return True, ""
        except Exception as error:  # a model may raise any type here; padded batches still work
            return False, f"{type(error).__name__} on a packed row: {reason(error)}"
        finally:
            self.limits, self.stats = limits, stats


def _distinct(wants: Sequence[ScoreRequest]) -> list[_Asked]:
    """The distinct sequences, sorted, each with its requests."""
    found: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for index, want in enumerate(wants):
        found.setdefault(want.tokens, []).append((index, want.targets))
    out = []
    for tokens in sorted(found):
        longest = max(len(targets) for _, targets in found[tokens])
        out.append(_Asked(Query(tokens, len(tokens) - longest), found[tokens]))
    return out


def _lookups(
    found: list[tuple[_Asked, np.ndarray]], inverse: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Flat (row among the queried hidden states, target) pairs, and their owners (request, number of targets)."""
    rows: list[np.ndarray] = []
    targets: list[int] = []
    owners: list[tuple[int, int]] = []
    at = 0
    for asked, places in found:
        mine = inverse[at : at + len(places)]
        at += len(places)
        for index, wanted in asked.wants:
            rows.append(mine[len(mine) - len(wanted) :])
            targets.extend(wanted)
            owners.append((index, len(wanted)))
    return np.concatenate(rows), np.array(targets, np.int64), owners


def _padded_batches(asked: list[_Asked], tokens: int) -> Iterator[list[_Asked]]:
    """Batches of at most `tokens` tokens, padding included, longest first."""
    batch: list[_Asked] = []
    for one in sorted(asked, key=lambda a: -len(a.query.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].query.tokens) > tokens:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _longest_packed(model: PreTrainedModel) -> int:
    """Longest sequence for which every layer attends to the whole past and rotary angles do not change."""
    config = model.config.get_text_config()
    bounds = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if one.get("rope_type") in ("dynamic", "longrope"):
            bounds.append(one.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min((b - 1 for b in bounds if isinstance(b, int) and b > 0), default=2**31)


def _made_up(vocabulary: int) -> list[ScoreRequest]:
    """Synthetic sequences that share a prefix, branch twice, and end at different depths."""
    token = lambda i: 1 + i * 7919 % (vocabulary - 1)  # noqa: E731
    stem = tuple(token(i) for i in range(8))
    question = [stem + tuple(token(20 + 9 * q + i) for i in range(4 + q)) for q in range(4)]
    ends = [tuple(token(70 + 3 * e + i) for i in range(1 + e)) for e in range(3)]
    return [ScoreRequest((q + e)[:-1], e) for q in question for e in ends]


def _allowed(dtype: torch.dtype) -> float:
    """Tolerance for rounding by order of summation, in nats over up to three tokens."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.5
