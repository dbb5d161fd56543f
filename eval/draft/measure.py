"""Decoding with and without a draft, interleaved: equal text, tokens per second, acceptance, memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from dropformer.eval.cost.memory import kv_bytes, parameter_bytes
from dropformer.eval.cost.timing import Clock
from dropformer.metrics.draft.acceptance import shortened
from dropformer.prune.block_map import Surgery
from dropformer.prune.draft.generation import sources_of, speculation
from dropformer.prune.draft.shared_cache import recording_cache, view_of
from dropformer.prune.loading.device import gpus_of


@dataclass(frozen=True)
class DraftRun:
    """Results of decoding after each prompt, without and with the draft; seconds of decoding alone.

    equal: of each greedy text, whether it is the dense model's; empty where texts are sampled, and differ by chance.
    rounds: (drafted, accepted) of every round.  pair_bytes: parameters of both models, shared ones counted once;
    view_bytes: cache of the draft that is not shared with the dense model's, in a round.
    """

    equal: list[bool]
    tokens: list[int]
    dense_seconds: list[float]
    drafted_seconds: list[float]
    rounds: list[tuple[int, int]] = field(default_factory=list)
    dense_bytes: int = 0
    pair_bytes: int = 0
    kv_bytes: int = 0
    view_bytes: int = 0

    @property
    def speedup(self) -> float:
        """The median over prompts of dense seconds over seconds with the draft."""
        return statistics.median(a / b for a, b in zip(self.dense_seconds, self.drafted_seconds, strict=True))

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Without and with the draft, over all prompts."""
        total = sum(self.tokens)
        return total / sum(self.dense_seconds), total / sum(self.drafted_seconds)

    @property
    def acceptance(self) -> float:
        """Accepted over verified tokens: a round verifies those it accepts and, unless all are accepted, one more."""
        verified = sum(accepted + (accepted < drafted) for drafted, accepted in self.rounds)
        return sum(accepted for _, accepted in self.rounds) / max(1, verified)

    @property
    def round_tokens(self) -> float:
        """Mean tokens per round, of rounds with drafted tokens."""
        given = [accepted + 1 for drafted, accepted in self.rounds if drafted]
        return sum(given) / max(1, len(given))


def run_draft(
    dense: PreTrainedModel,
    draft: PreTrainedModel,
    surgery: Surgery,
    prompts: Sequence[tuple[Tensor, Cache | None]],
    new: int = 64,
    temperature: float = 0.0,
) -> DraftRun:
    """Decode `new` tokens after each prompt [1, T], without and with the draft, in alternating order.

    prompts: each with the dense model's cache of it, or of a longer text that begins with it; None: it is read once
    for both, untimed.  temperature 0: greedy; else both sample.  Time: two generations per prompt.
    """
    run = DraftRun([], [], [], [])
    clock = Clock(gpus_of(dense))
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    how: dict[str, Any] = sampling if temperature else {"do_sample": False}
    how |= {"max_new_tokens": new, "min_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    model: Any = dense
    with_draft = {"custom_generate": speculation(draft, surgery, run.rounds)}
    sizes = (0, 0)
    for turn, (prompt, held) in enumerate(prompts):
        cache = shortened(held or _read(dense, prompt), prompt.shape[1])
        sizes = kv_bytes(cache), _view_bytes(cache, draft, surgery)
        found: dict[bool, tuple[Tensor, float]] = {}
        for drafted in (bool(turn % 2), not turn % 2):
            past, way = shortened(cache, prompt.shape[1] - 1), with_draft if drafted else {}

            def decode(past: Any = past, way: dict[str, Any] = way, prompt: Tensor = prompt) -> Any:
                return model.generate(prompt, past_key_values=past, **way, **how)

            text, took = clock.timed(decode)
            found[drafted] = text, took.wall
        if not temperature:
            run.equal.append(torch.equal(found[False][0], found[True][0]))
        run.tokens.append(found[False][0].shape[1] - prompt.shape[1])
        run.dense_seconds.append(found[False][1])
        run.drafted_seconds.append(found[True][1])
    both = parameter_bytes(nn.ModuleList([dense, draft]))
    return DraftRun(
        run.equal, run.tokens, run.dense_seconds, run.drafted_seconds, run.rounds, parameter_bytes(dense), both, *sizes
    )


@torch.inference_mode()
def _read(dense: PreTrainedModel, prompt: Tensor) -> Cache:
    cache = recording_cache(dense)
    dense(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _view_bytes(cache: Cache, draft: PreTrainedModel, surgery: Surgery) -> int:
    """Bytes of a view of the cache that it does not share with the cache."""
    layers: list[Any] = [entry for entry in cache.layers if getattr(entry, "is_initialized", False)]
    own = {entry.keys.untyped_storage().data_ptr() for entry in layers}
    view = view_of(shortened(cache, cache.get_seq_length()), draft, sources_of(surgery))
    tensors = [
        t
        for entry in view.layers
        for name in ("keys", "sink_keys")
        if isinstance(t := getattr(entry, name, None), Tensor) and t.untyped_storage().data_ptr() not in own
    ]
    return 2 * sum(t.numel() * t.element_size() for t in tensors)  # keys, and values like them
