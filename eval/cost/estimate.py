"""What a drop would cost and save on a device, from the config alone: no weights are needed.

The model is built on the meta device, so parameters, experts and KV bytes are exact; times are a
roofline (Williams et al. 2009): linear layers and attention run one after the other, each takes
max(FLOPs / peak, bytes / bandwidth).  Only what the kernels do with the KV cache differs between
programs, and it decides most of what dropping attention saves:

fused   the cache is written in place and read once by a fused kernel (FlashAttention, vLLM)
sdpa    transformers' default: the cache is concatenated anew at every step, then read once
eager   transformers' eager attention: also repeats key heads for grouped queries and writes the
        scores to memory
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from dropformer.eval.cost.hardware import Hardware
from dropformer.eval.cost.model_cost import BlockWork, Drops, ModelCost, work_of
from dropformer.prune.errors import EvaluationError, ModelError, PlanError
from dropformer.prune.loading.load import read_model_config
from dropformer.recipes import Recipe, open_config, recipes

LAUNCHES = {"attention": 45, "mlp": 20}  # small operations of a Llama branch in transformers, counted


@dataclass(frozen=True)
class Kernels:
    """What an attention implementation does with keys and values: see the module's docstring."""

    name: str
    concatenates: bool
    repeats: bool
    writes_scores: bool


KERNELS: dict[str, Kernels] = {
    kernels.name: kernels
    for kernels in (
        Kernels("fused", False, False, False),
        Kernels("sdpa", True, False, False),
        Kernels("eager", True, True, True),
    )
}


@dataclass(frozen=True)
class Workload:
    """`batch` sequences that end at `context` tokens, the last `new_tokens` of them decoded.

    new_tokens None: half of the context, as arXiv 2406.15786 measures (2048 in, 2048 out).
    """

    context: int = 4096
    batch: int = 1
    new_tokens: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.context < 2 or self.batch < 1 or not 0 < self.new < self.context:
            raise EvaluationError(
                f"cannot estimate {self.new} new tokens in a context of {self.context} at batch {self.batch}; "
                "expected a batch of 1 or more and new tokens fewer than the context"
            )
        if not hasattr(torch, self.dtype):
            raise EvaluationError(f"unknown dtype `{self.dtype}`; expected bfloat16, float16 or float32")

    @property
    def new(self) -> int:
        return self.context // 2 if self.new_tokens is None else self.new_tokens

    @property
    def prompt(self) -> int:
        return self.context - self.new

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return torch.empty((), dtype=getattr(torch, self.dtype)).element_size()


@dataclass(frozen=True)
class Times:
    """Seconds of the prefill and of all decode steps together."""

    prefill: float
    decode: float

    @property
    def generation(self) -> float:
        return self.prefill + self.decode


@dataclass(frozen=True)
class Speedup:
    """How many times faster than the dense model: prefill, decode, and both together."""

    prefill: float
    decode: float
    generation: float


@dataclass(frozen=True)
class Side:
    """The dense or the pruned model under a workload on a device.

    kv_bytes: of all sequences at the full context.  prefill_flops: of the whole batch; decode_flops:
    of one step half-way.  devices: how many are needed to hold weights and cache; they work one after
    the other (`device_map="auto"`), so more of them do not make it faster.
    """

    work: ModelCost
    workload: Workload
    hardware: Hardware

    @property
    def parameters(self) -> int:
        return self.work.parameters

    @property
    def active_parameters(self) -> int:
        return self.work.active

    @property
    def checkpoint_bytes(self) -> int:
        return self.work.parameters * self.workload.size

    @property
    def kv_bytes_per_token(self) -> int:
        return self.work.kv_per_token * self.workload.size

    @property
    def kv_bytes(self) -> int:
        return self.workload.batch * self.work.kv(self.workload.context) * self.workload.size

    @property
    def prefill_flops(self) -> float:
        return self.work.prefill_flops(self.workload.batch, self.workload.prompt)

    @property
    def decode_flops(self) -> float:
        return self.work.decode_flops(self.workload.batch, self.workload.prompt + self.workload.new // 2)

    @property
    def devices(self) -> int:
        return max(1, math.ceil((self.checkpoint_bytes + self.kv_bytes) / self.hardware.memory))

    @cached_property
    def times(self) -> dict[str, Times]:
        """Roofline times by kernels: "fused", "sdpa", "eager"."""
        return {name: _times(self, kernels) for name, kernels in KERNELS.items()}


@dataclass(frozen=True)
class Estimate:
    """The dense model beside the pruned one."""

    dense: Side
    pruned: Side

    def speedup(self, kernels: str = "fused") -> Speedup:
        before, after = self.dense.times[kernels], self.pruned.times[kernels]
        return Speedup(
            before.prefill / after.prefill,
            before.decode / after.decode,
            before.generation / after.generation,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON report."""
        sides = {"dense": self.dense, "pruned": self.pruned}
        figures = {name: {field: getattr(side, field) for field in _FIGURES} for name, side in sides.items()}
        seconds = {
            name: {kernels: vars(times) for kernels, times in side.times.items()} for name, side in sides.items()
        }
        speedups = {kernels: vars(self.speedup(kernels)) for kernels in KERNELS}
        return {**figures, "seconds": seconds, "speedup": speedups, "hardware": vars(self.dense.hardware)}


_FIGURES = (
    "parameters", "active_parameters", "checkpoint_bytes", "kv_bytes_per_token", "kv_bytes",
    "prefill_flops", "decode_flops", "devices",
)  # fmt: skip


def estimate(
    config: PreTrainedConfig | Mapping[str, Any] | ModelCost,
    drops: Drops,
    hardware: Hardware,
    workload: Workload | None = None,
) -> Estimate:
    """Estimate what dropping layers changes.

    config: a transformers config, its keys and values (with `model_type`), or the work of a model.  drops: for example
    {"attn": 40} or {"attn": {20, 21}, "mlp": {9}}: see `Work.drop`.  Raises ModelError for a config that
    builds no causal language model, PlanError for layers that it does not have.
    """
    workload = workload or Workload()
    work = config if isinstance(config, ModelCost) else config_work(config)
    left = work.drop(drops)
    if not any(block.attention for block in left.blocks) and any(block.attention for block in work.blocks):
        raise PlanError("no attention layer would be left, and a model without any mixes no tokens; drop fewer")
    return Estimate(Side(work, workload, hardware), Side(left, workload, hardware))


def named_config(name: str, revision: str | None = None) -> PreTrainedConfig | dict[str, Any]:
    """The config of a model by recipe name, folder or Hub id; a recipe that holds one needs no network.

    Raises ModelError if the model cannot be found.
    """
    known = recipes().get(name)
    if known is not None and known.config and revision is None:
        return dict(known.config)
    return read_model_config(open_config(name, revision).path)


def published_speedup(recipe: Recipe | None, spec: str) -> float | None:
    """The speed-up that was published for this drop spec, as `attn:40`; None if none was."""
    for result in recipe.results if recipe else ():
        if result.drop == spec.replace(" ", ""):
            return result.speedup
    return None


def config_work(config: PreTrainedConfig | Mapping[str, Any]) -> ModelCost:
    """The work of the model that a config describes, built on the meta device: no memory, no weights."""
    try:
        if isinstance(config, Mapping):
            config = AutoConfig.for_model(**config)
        with torch.device("meta"):  # bfloat16: grouped experts accept nothing else there
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"the config builds no causal language model ({reason}); expected a decoder's") from error
    return work_of(model.eval())


def _times(side: Side, kernels: Kernels) -> Times:
    workload = side.workload
    steps = [_decode_step(side, kernels, context) for context in _samples(workload)]
    return Times(_prefill(side, kernels), workload.new * sum(steps) / len(steps))


def _samples(workload: Workload, count: int = 8) -> list[int]:
    """Contexts spread evenly over the new tokens, at the middle of each of `count` parts."""
    return [workload.prompt + int(workload.new * (part + 0.5) / count) for part in range(count)]


def _prefill(side: Side, kernels: Kernels) -> float:
    work, batch, tokens = side.work, side.workload.batch, side.workload.prompt
    linear_only = ModelCost(tuple(_without_pairs(block) for block in work.blocks), work.head, work.lookup, work.other)
    linear_flops = linear_only.prefill_flops(batch, tokens)
    linear = side.hardware.seconds(linear_flops, work.read(batch * tokens) * side.workload.size)
    kept = batch * work.kv(tokens)
    scores = sum(block.heads * tokens * block.seen(tokens) for block in work.blocks) * batch
    elements = kept + (_SCORE_PASSES * scores if kernels.writes_scores else 0)
    pairs = work.prefill_flops(batch, tokens) - linear_flops
    return linear + side.hardware.seconds(pairs, elements * side.workload.size) + _launches(side)


# Passes over the scores of eager attention in 16 bits: written (1), masked (2), softmax in 32 bits (1 + 2),
# cast back (2 + 1), multiplied by the values (1).
_SCORE_PASSES = 10


def _decode_step(side: Side, kernels: Kernels, context: int) -> float:
    work, batch, size = side.work, side.workload.batch, side.workload.size
    linear_flops = 2 * batch * (sum(block.active for block in work.blocks) + work.head)
    linear = side.hardware.seconds(linear_flops, work.read(batch) * size)
    pairs = work.decode_flops(batch, context) - linear_flops
    elements = sum(block.kv * block.seen(context) * _reads(block, kernels) for block in work.blocks)
    attention = side.hardware.seconds(pairs, batch * elements * size)
    copied = 2 * batch * work.kv(context) * size if kernels.concatenates else 0
    return linear + attention + side.hardware.copy_seconds(copied) + _launches(side)


def _reads(block: BlockWork, kernels: Kernels) -> int:
    """Times each kept key and value crosses the memory bus in a step, the concatenation not counted."""
    return 2 * block.groups + 1 if kernels.repeats and block.groups > 1 else 1


def _launches(side: Side) -> float:
    attention = sum(block.attention > 0 for block in side.work.blocks)
    mlp = sum(block.mlp > 0 for block in side.work.blocks)
    return side.hardware.launch * (attention * LAUNCHES["attention"] + mlp * LAUNCHES["mlp"])


def _without_pairs(block: BlockWork) -> BlockWork:
    return BlockWork(block.attention, block.mlp, block.shared, experts=block.experts)
