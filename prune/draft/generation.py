"""Speculative decoding with a draft that reads the dense model's cache, through transformers' own loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from dropformer.prune.block_map import Surgery
from dropformer.prune.draft.grouped_queries import grouped_queries
from dropformer.prune.draft.shared_cache import view_of
from dropformer.prune.errors import ModelError, PlanError
from dropformer.prune.loading.window_attention import first_real

DRAFT_TOKENS = 4  # default number of drafted tokens per round


class DraftedCandidates(AssistedCandidateGenerator):
    """transformers' assisted candidates, with a view of the dense model's cache as the assistant's cache.

    `counts`: (drafted, accepted) tokens per round.
    """

    sources: Sequence[int]
    counts: list[tuple[int, int]]
    cache: Any

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> Any:
        """Nothing is drafted before the dense model has read the prompt."""
        if self.cache.get_seq_length() != input_ids.shape[1] - 1:
            return input_ids, None
        return super().get_candidates(input_ids, **kwargs)

    def _update_past_and_masks(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> bool:
        mask = self.assistant_kwargs.get("attention_mask")
        if mask is not None:
            new = mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])
            mask = self.assistant_kwargs["attention_mask"] = torch.cat([mask, new], 1)
        self.assistant_kwargs.pop("position_ids", None)  # generate makes them from the mask
        first = None if mask is None else first_real(mask)
        self.assistant_kwargs["past_key_values"] = view_of(self.cache, self.assistant_model, self.sources, first)
        return True

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: int) -> None:
        self.counts.append((scores.shape[1] - 1, int(num_matches)))
        super().update_candidate_strategy(input_ids, scores, num_matches)


def set_drafting(draft: PreTrainedModel, tokens: int) -> None:
    """Draft `tokens` tokens in every round, whatever their probability; the dense model's settings stay.

    Raises PlanError for less than one.
    """
    if tokens < 1:
        raise PlanError(f"a draft is of one token a round or more, and tokens is {tokens}")
    settings = draft.generation_config = copy.deepcopy(draft.generation_config)
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = tokens, "constant"
    settings.assistant_confidence_threshold = 0.0


def sources_of(surgery: Surgery) -> list[int]:
    """The dense block whose attention each block of the draft has.

    Raises ModelError for a model of several stacks, which have several caches.
    """
    if len(surgery.outline.stacks) != 1:
        raise ModelError("a draft shares the cache of a decoder with one stack; use assistant_model=draft instead")
    return [block.source for block in next(iter(surgery.block_map.stacks.values()))]


def speculation(draft: PreTrainedModel, surgery: Surgery, counts: list[tuple[int, int]] | None = None) -> Callable:
    """A function for `model.generate(custom_generate=...)` with which the draft drafts for the model.

    The draft needs no prefill and, except for a window's tokens, no cache.  The model is not changed: a shallow copy
    with the same modules runs transformers' assisted decoding.  `counts` receives (drafted, accepted) per round.
    """
    sources, kept = sources_of(surgery), counts if counts is not None else []

    def decode(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        class Drafted(type(model)):  # type: ignore[misc]
            def _get_candidate_generator(self, **given: Any) -> DraftedCandidates:
                names = ("input_ids", "assistant_model", "generation_config", "model_kwargs", "logits_processor")
                made = DraftedCandidates(**{name: given[name] for name in names})
                made.sources, made.counts, made.cache = sources, kept, given["model_kwargs"]["past_key_values"]
                return made

            def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **given: Any) -> Any:
                """As the model's, without reading again what the caller's cache holds of the prompt."""
                held = given["past_key_values"].get_seq_length()
                if given.get("next_sequence_length") is None and held:
                    given["next_sequence_length"] = input_ids.shape[1] - held
                return super().prepare_inputs_for_generation(input_ids, *args, **given)

        stand_in = copy.copy(model)
        stand_in.__class__ = Drafted
        with grouped_queries():
            return stand_in._assisted_decoding(input_ids, assistant_model=draft, **kwargs)

    return decode
