"""`FastLM`: lm-eval's `hf` model with the forward passes packed.

Everything around the forwards is lm-eval's own class: tokenization, the split of context and continuation,
the BOS rule, truncation from the left, chat templates. What changes is which tokens are computed: a few-shot
prefix once, the choices of a question together, no padding, logits only where they are read (`scorer`).

    lm_eval.simple_evaluate(FastLM(model, tokenizer), tasks=["hellaswag"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dropformer.eval.tasks.packing import Limits
from dropformer.eval.tasks.prefix_cache import PrefixCache, longest_stem
from dropformer.eval.tasks.scorer import Score, Scorer, ScoreRequest, Stats
from dropformer.prune.errors import EvaluationError
from dropformer.prune.loading.quiet import quiet_logger

Tokenized = tuple[tuple[str, str] | None, list[int], list[int]]

Progress = Callable[[int, int], None]
"""Called with the requests answered and all that were asked."""

AT_ONCE = 16384
"""Requests tokenized at a time: a few-shot prompt's token ids take more memory than its text."""


class FastLM(HFLM):
    """lm-eval `LM` whose log-likelihoods come from packed rows.

    model: a causal LM in memory, dense or pruned. options: those of lm-eval's `hf` model (max_length,
    add_bos_token, prefix_token_id, ...). limits: how large a packed row may be. pack=False pads instead.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits | None = None,
        pack: bool = True,
        **options: Any,
    ) -> None:
        with without_remarks():
            super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, **options)
        self.scorer = Scorer(model, limits, pack)
        self._encoded: dict[str, list[int]] = {}
        self._stem: PrefixCache | None = None
        self.progress: Progress | None = None

    @property
    def stats(self) -> Stats:
        """Tokens computed against tokens needed, since this was built."""
        return self.scorer.stats

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each request's continuation: lm-eval's contract."""
        disable_tqdm = disable_tqdm or self.progress is not None  # someone else shows how far it is
        answers: list[tuple[float, bool]] = []
        for start in range(0, len(requests), AT_ONCE):
            part = requests[start : start + AT_ONCE]
            with self._encoding_ahead(part):
                answers += super().loglikelihood(part, disable_tqdm=disable_tqdm)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the model's context: lm-eval's contract."""
        windows: list[Tokenized] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, continuation = make_disjoint_window(pair)
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled text for each request, by lm-eval's own loop behind the prompts' common stem."""
        self._stem = self._common_stem([request.args[0] for request in requests])
        try:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self._stem = None

    def _common_stem(self, contexts: Sequence[str]) -> PrefixCache | None:
        """What all prompts begin with, computed; None where it is short, or the model has shown no trunk."""
        if not self.scorer.packs or len(contexts) < 2:
            return None
        prompts = [self.tok_encode(context) for context in contexts]
        length = longest_stem(prompts)
        if length < self.scorer.limits.shared or max(map(len, prompts)) > self.scorer.longest:
            return None
        return PrefixCache(torch.tensor(prompts[0][:length]), self.scorer.trunk_cache(prompts[0][:length]))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        mask = options.get("attention_mask")
        if self._stem is not None and mask is not None and options.get("num_beams", 1) == 1:
            moved = self._stem.under(context, mask)
            if moved is not None:
                context, options["attention_mask"] = moved
                options["past_key_values"] = self._stem.cache_for(len(context))
        return super()._model_generate(context, max_length, stop, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[Tokenized], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        wants = [self._want(context, continuation) for _, context, continuation in requests]
        answered = 0

        def done(index: int, score: Score) -> None:
            nonlocal answered
            answered += 1
            if self.progress:
                self.progress(answered, len(wants))
            if (strings := requests[index][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", strings, (score.logprob, score.greedy))

        scores = self.scorer.score(wants, done)
        return [(score.logprob, score.greedy) for score in scores]

    def _want(self, context: list[int], continuation: list[int]) -> ScoreRequest:
        """The tokens that go in: cut from the left to the context, without the last, which is only scored."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise EvaluationError(
                f"a request has {len(context)} tokens of context and {len(continuation)} to score; both must "
                f"be there and the latter fit the model's {self.max_length}: drop the task or raise max_length"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
        return ScoreRequest(tuple(tokens), tuple(continuation))

    @contextmanager
    def _encoding_ahead(self, requests: list[Instance]) -> Iterator[None]:
        """Encodes all contexts and texts in one call, which a fast tokenizer spreads over its threads."""
        texts: set[str] = set()
        for request in requests:
            context, continuation = request.args
            bare = context.rstrip()
            texts |= {bare, context + continuation} if context else set()
        bos = self.tokenizer.decode(self.prefix_token_id)  # such texts get no second one, so not from here
        ordered = sorted(text for text in texts if text and not text.startswith(bos))
        flags = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        try:
            if ordered:
                self._encoded = dict(zip(ordered, self.tokenizer(ordered, **flags)["input_ids"], strict=True))
            yield
        finally:
            self._encoded = {}

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """lm-eval's encoding of a string, from those made ahead where there is one."""
        if add_special_tokens is None and not left_truncate_len and string in self._encoded:
            return list(self._encoded[string])
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)


def without_remarks() -> AbstractContextManager[None]:
    """lm-eval warns that a model in memory ignores loading options; here that is the purpose."""
    return quiet_logger("lm_eval.models.huggingface")


def own_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> HFLM:
    """lm-eval's own model class, for comparison."""
    with without_remarks():
        return HFLM(model, backend="causal", tokenizer=tokenizer, **options)
