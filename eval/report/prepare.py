"""The inputs of an evaluation, built and checked before anything is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dropformer.eval.compare.compatibility import SharedTokens
from dropformer.eval.cost.sinks import Sinks, fitting, sink_cache
from dropformer.eval.cost.timing import Setting
from dropformer.eval.quality.long_context import LongText, text_tokens, with_facts
from dropformer.eval.quality.perplexity import HELD_OUT
from dropformer.eval.tasks.results import TaskOptions
from dropformer.metrics.calibration.generated import Writer, written_windows
from dropformer.metrics.calibration.settings import Calibration, context_of
from dropformer.metrics.calibration.text import writes_itself
from dropformer.metrics.calibration.windows import Windows, windows
from dropformer.prune.errors import EvaluationError
from dropformer.prune.loading.device import input_device
from dropformer.prune.plan import Plan
from dropformer.prune.samples.inputs import writes_text
from dropformer.recipes.source import short_name

LONG_TEXTS = 2  # texts in which perplexity by position is measured


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate.

    text: windows for perplexity and KL (None: neither).  speed: settings to measure; empty with `seconds` > 0
    chooses one that takes about that long.  compile: also measure decoding with torch.compile (None: on a GPU).
    stream: tokens to read past the context with attention sinks (0: none), with a cache window of `window` tokens
    (None: 1024, or the model's context).  long: tokens at which perplexity by position, facts from five depths, KV
    bytes and decode speed are measured (0: none).
    """

    tasks: tuple[str, ...] = ()
    task_options: TaskOptions = field(default_factory=TaskOptions)
    text: Calibration | None = None
    probes: bool = False
    speed: tuple[Setting, ...] = ()
    seconds: float = 0.0
    repeats: int = 5
    compile: bool | None = None
    stream: int = 0
    window: int | None = None
    long: int = 0


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, with name and tokenizer; `plan`: the plan that made it from the dense model, if known."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    plan: Plan | None = None


@dataclass(frozen=True)
class Inputs:
    """Windows for perplexity, token ids [T] to stream with the cache shape, and long texts."""

    text: Windows | None = None
    stream: Tensor | None = None
    shape: Sinks | None = None
    long: tuple[LongText, ...] = ()


def prepare(models: Sequence[Candidate], options: EvaluationOptions) -> Inputs:
    """Tokenize the texts and check every model.  Raises errors now that would otherwise occur hours later."""
    if not models:
        raise EvaluationError("evaluate needs the dense model, and usually pruned ones after it")
    dense = models[0]
    for candidate in models:
        _check(candidate, dense, options)
    data = _shared_windows(models, options.text) if options.text else None
    long = _long_texts(models, options) if options.long else ()
    if not options.stream:
        return Inputs(data, long=long)
    if options.stream < 2:
        raise EvaluationError("a stream of 1 token has nothing to score; give 2 tokens or more")
    name = options.text.name if options.text else "heldout"
    ids = windows(Calibration(name, samples=1, length=options.stream), dense.tokenizer).ids[0]
    shape = fitting(dense.model, options.window)
    for candidate in models:
        sink_cache(candidate.model, shape)  # raises for a model that cannot stream
    return Inputs(data, ids, shape, long)


def _long_texts(models: Sequence[Candidate], options: EvaluationOptions) -> tuple[LongText, ...]:
    """Long texts with facts.  Raises EvaluationError if they exceed a context or are too short for the facts."""
    for candidate in models:
        _check_context(candidate, options.long, "give fewer tokens to --long")
    chosen, tokenizer = options.text or HELD_OUT, models[0].tokenizer
    text = Calibration(chosen.name, LONG_TEXTS, text_tokens(options.long, tokenizer), chosen.seed)
    rows = _shared_windows(models, text).ids
    return tuple(with_facts(row, tokenizer, seed) for seed, row in enumerate(rows))


def _shared_windows(models: Sequence[Candidate], text: Calibration) -> Windows:
    """Windows that are the same with every model's own tokenizer.  Raises ModelError where they differ."""
    dense, *others = models
    if writes_itself(text.name):
        _shared_windows(models, replace(text, name="builtin", samples=1))  # raises for another tokenizer
        return written_windows(text, Writer(dense.model, dense.tokenizer))
    tokens = SharedTokens(text, dense.name, dense.tokenizer)
    for candidate in others:
        if candidate.tokenizer is not None:
            tokens.check(candidate.name, candidate.tokenizer)
    return tokens.windows


def _check(candidate: Candidate, dense: Candidate, options: EvaluationOptions) -> None:
    if not writes_text(candidate.model) and not candidate.model.config.is_encoder_decoder:
        raise EvaluationError(
            f"{candidate.name} does not write text token by token, and an evaluation reads text; "
            "`prune --model ... --drop ...` compares its outputs with the dense model's in report.json, and "
            "`prune estimate` says what it costs"
        )
    if candidate.tokenizer is None and (candidate is dense or options.tasks or options.probes):
        raise EvaluationError(f"{candidate.name} has no tokenizer, so it cannot read text; put one beside its weights")
    if any(setting.batch == "max" for setting in options.speed) and input_device(candidate.model).type != "cuda":
        raise EvaluationError("batch `paper` fills a GPU's memory, and the model is not on one; give a number")
    longest = max([setting.prompt + setting.new for setting in options.speed], default=0)
    _check_context(candidate, longest, "give a shorter --context or fewer --new-tokens")
    if options.text:
        _check_context(
            candidate,
            options.text.length,
            "give a shorter --length" + ", or --stream for longer texts" * (not options.stream),
        )
    mine, theirs = _vocabulary(candidate), _vocabulary(dense)
    if options.text and mine != theirs:
        raise EvaluationError(
            f"{dense.name} has {theirs} tokens and {candidate.name} {mine}; perplexity and KL are compared over one "
            "vocabulary: give a model and its own pruned versions, or --text ''"
        )


def _check_context(candidate: Candidate, tokens: int, advice: str) -> None:
    """Raises EvaluationError beyond the context: no learned positions there, and untrained rotary ones."""
    context = context_of(candidate.model.config)
    if context and tokens > context:
        raise EvaluationError(f"{tokens} tokens are more than the context of {candidate.name}, {context}; {advice}")


def _vocabulary(candidate: Candidate) -> int:
    head = candidate.model.get_output_embeddings()
    return int(head.weight.shape[0]) if head is not None else 0


def labels(names: Sequence[str]) -> list[str]:
    """A unique short name per model: the last part of its path, or the full name where that is shared."""
    short = [short_name(name) for name in names]
    shared = Counter(short)
    found = [whole if shared[one] > 1 else one for one, whole in zip(short, names, strict=True)]
    seen: Counter[str] = Counter()
    for i, name in enumerate(found):
        seen[name] += 1
        found[i] = f"{name} #{seen[name]}" if seen[name] > 1 else name
    return found
