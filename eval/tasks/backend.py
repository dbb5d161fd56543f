"""`FastLM`: lm-eval's `hf` model with packed forward passes.

Tokenization, the split of context and continuation, the BOS rule, truncation from the left and chat templates are
lm-eval's own. Only the computed tokens differ: a few-shot prefix once, the choices of a question together, no padding,
logits only where they are read (`scorer`).

    lm_eval.simple_evaluate(FastLM(model, tokenizer), tasks=["hellaswag"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dropformer.eval.cost.memory import kv_bytes_per_token
from dropformer.eval.tasks.packing import Limits
from dropformer.eval.tasks.prefix_cache import PrefixCache, longest_stem
from dropformer.eval.tasks.scorer import Score, Scorer, ScoreRequest, Stats
from dropformer.metrics.calibration.batching import SHARE, activation_bytes, windows_at_once
from dropformer.progress import Tick
from dropformer.prune.errors import EvaluationError
from dropformer.prune.loading.device import free_bytes, gpus_of
from dropformer.prune.loading.quiet import quiet_logger

Tokenized = tuple[tuple[str, str] | None, list[int], list[int]]

OWN_TOKENS = 2048  # assumed request length for the batch size of lm-eval's own class
TOGETHER_CPU, TOGETHER_GPU = 8, 64  # largest batch of prompts in generation

AT_ONCE = 16384
"""Requests tokenized at a time: a few-shot prompt's token ids take more memory than its text."""


class FastLM(HFLM):
    """lm-eval `LM` whose log-likelihoods come from packed rows.

    model: a causal LM in memory, dense or pruned. options: those of lm-eval's `hf` model (max_length,
    add_bos_token, prefix_token_id, ...). limits: size of a packed row. pack=False pads instead.
    batch_size: prompts per batch in generation; None: by their length and free memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits | None = None,
        pack: bool = True,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        size = batch_size or 1
        with without_remarks():
            super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=size, **options)
        self._chooses = batch_size is None
        self.scorer = Scorer(model, limits, pack)
        self._encoded: dict[str, list[int]] = {}
        self._stem: PrefixCache | None = None
        self.progress: Tick | None = None

    @property
    def stats(self) -> Stats:
        """Tokens computed and needed since construction."""
        return self.scorer.stats

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each request's continuation: lm-eval's contract."""
        disable_tqdm = disable_tqdm or self.progress is not None
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
        """Greedy or sampled text for each request, by lm-eval's own loop after the prompts' cached common prefix."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        self._stem = self._common_stem(prompts)
        if self._chooses and requests:
            settings = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
            new = max(each["max_gen_toks"] for each in settings)
            self.batch_size_per_gpu = prompts_at_once(self.model, min(max(map(len, prompts)) + new, self.max_length))
        try:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self._stem = None

    def _common_stem(self, prompts: Sequence[list[int]]) -> PrefixCache | None:
        """The cache of the prompts' common prefix; None if it is short, or the model does not support packing."""
        if not self.scorer.packs or len(prompts) < 2:
            return None
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
        """The input tokens, truncated from the left to the context, without the last one, which is only scored."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise EvaluationError(
                f"a request has {len(context)} tokens of context and {len(continuation)} to score; expected at least "
                f"one of each and at most {self.max_length} to score: remove the task or raise max_length"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
        return ScoreRequest(tuple(tokens), tuple(continuation))

    @contextmanager
    def _encoding_ahead(self, requests: list[Instance]) -> Iterator[None]:
        """Encode all contexts and texts in one call, which a fast tokenizer runs on several threads."""
        texts: set[str] = set()
        for request in requests:
            context, continuation = request.args
            bare = context.rstrip()
            texts |= {bare, context + continuation} if context else set()
        bos = self.tokenizer.decode(self.prefix_token_id)  # texts that begin with BOS must not get a second one
        ordered = sorted(text for text in texts if text and not text.startswith(bos))
        flags = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        try:
            if ordered:
                self._encoded = dict(zip(ordered, self.tokenizer(ordered, **flags)["input_ids"], strict=True))
            yield
        finally:
            self._encoded = {}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """lm-eval's encoding of a string, from `_encoding_ahead` if it is there."""
        if add_special_tokens is None and not left_truncate_len and string in self._encoded:
            return list(self._encoded[string])
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)


def prompts_at_once(model: nn.Module, length: int) -> int:
    """Batch size for generation with up to `length` tokens per sequence; on a GPU, as many as fit with KV cache."""
    gpus = gpus_of(model)
    if not gpus:
        return TOGETHER_CPU
    each = length * (activation_bytes(model, length) + kv_bytes_per_token(model))
    return max(1, min(TOGETHER_GPU, *(int(SHARE * free_bytes(gpu)) // each for gpu in gpus)))


def without_remarks() -> AbstractContextManager[None]:
    """Silences lm-eval's warning that a model in memory ignores loading options."""
    return quiet_logger("lm_eval.models.huggingface")


def own_lm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None = None, **options: Any
) -> HFLM:
    """lm-eval's own model class, for comparison; it keeps full logits, so its batch size is for long requests."""
    size = batch_size or windows_at_once(model, OWN_TOKENS)
    with without_remarks():
        return HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=size, **options)
