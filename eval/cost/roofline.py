"""Roofline times of prefill and decoding (Williams et al. 2009), by attention implementation.

Linear layers and attention run in sequence; each takes max(FLOPs / peak, bytes / bandwidth).  Without CUDA graphs a GPU
waits where the host takes longer to launch the kernels than they run.  How the attention
implementation handles the KV cache decides most of what dropping attention saves:

fused   the cache is written in place and read once by a fused kernel (FlashAttention, vLLM)
sdpa    transformers' default: the cache is concatenated at every step, then read once
eager   transformers' eager attention: also repeats key heads for grouped queries and writes the
        scores to memory
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from dropformer.eval.cost.hardware import Hardware
from dropformer.eval.cost.model_cost import BlockCost, ModelCost
from dropformer.prune.errors import EvaluationError

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
LAUNCHES = {"attention": 45, "mlp": 20}  # counted small operations per Llama branch in transformers


@dataclass(frozen=True)
class Kernels:
    """How an attention implementation handles keys and values: see the module's docstring."""

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
        if self.dtype not in BYTES:
            raise EvaluationError(f"unknown dtype `{self.dtype}`; expected {', '.join(BYTES)}")

    @property
    def new(self) -> int:
        return self.context // 2 if self.new_tokens is None else self.new_tokens

    @property
    def prompt(self) -> int:
        return self.context - self.new

    @property
    def size(self) -> int:
        """Bytes per element."""
        return BYTES[self.dtype]


@dataclass(frozen=True)
class Times:
    """Seconds of the prefill and of all decode steps together."""

    prefill: float
    decode: float

    @property
    def generation(self) -> float:
        return self.prefill + self.decode


@dataclass(frozen=True)
class Side:
    """The dense or the pruned model under a workload on a device.

    kv_bytes: of all sequences at the full context.  prefill_flops: of the whole batch; decode_flops: of one step
    half-way.  devices: number needed for weights and cache; they run in sequence (`device_map="auto"`), so more of
    them are not faster.
    """

    cost: ModelCost
    workload: Workload
    hardware: Hardware

    @property
    def parameters(self) -> int:
        return self.cost.parameters

    @property
    def active_parameters(self) -> int:
        return self.cost.active

    @property
    def checkpoint_bytes(self) -> int:
        return self.cost.parameters * self.workload.size

    @property
    def kv_bytes_per_token(self) -> int:
        return self.cost.kv_per_token * self.workload.size

    @property
    def kv_bytes(self) -> int:
        return self.workload.batch * self.cost.kv(self.workload.context) * self.workload.size

    @property
    def prefill_flops(self) -> float:
        return self.cost.prefill_flops(self.workload.batch, self.workload.prompt)

    @property
    def decode_flops(self) -> float:
        return self.cost.decode_flops(self.workload.batch, self.workload.prompt + self.workload.new // 2)

    @property
    def devices(self) -> int:
        return max(1, math.ceil((self.checkpoint_bytes + self.kv_bytes) / self.hardware.memory))

    @cached_property
    def times(self) -> dict[str, Times]:
        """Roofline times by kernels: "fused", "sdpa", "eager"."""
        return {name: _times(self, kernels) for name, kernels in KERNELS.items()}


def _times(side: Side, kernels: Kernels) -> Times:
    workload = side.workload
    steps = [step_seconds(side, kernels, context) for context in _samples(workload)]
    return Times(_prefill(side, kernels), workload.new * sum(steps) / len(steps))


def _samples(workload: Workload) -> list[int]:
    """Eight context lengths, evenly spread over the new tokens."""
    return [workload.prompt + int(workload.new * (part + 0.5) / 8) for part in range(8)]


def _prefill(side: Side, kernels: Kernels) -> float:
    cost, batch, tokens = side.cost, side.workload.batch, side.workload.prompt
    linear_only = replace(cost, blocks=tuple(_without_pairs(block) for block in cost.blocks))
    linear_flops = linear_only.prefill_flops(batch, tokens)
    linear = side.hardware.seconds(linear_flops, cost.read(batch * tokens) * side.workload.size)
    kept = batch * cost.kv(tokens)
    scores = sum(block.heads * tokens * block.seen(tokens) for block in cost.blocks) * batch
    elements = kept + (_SCORE_PASSES * scores if kernels.writes_scores else 0)
    pairs = cost.prefill_flops(batch, tokens) - linear_flops
    return _with_launches(side, kernels, linear + side.hardware.seconds(pairs, elements * side.workload.size))


# 16-bit passes over the scores of eager attention: write (1), mask (2), softmax in 32 bits (1 + 2), cast back (2 + 1),
# product with the values (1).
_SCORE_PASSES = 10


def step_seconds(side: Side, kernels: Kernels, context: int, tokens: int = 1) -> float:
    """Seconds of a step that decodes `tokens` tokens per sequence after `context`, reading weights and cache once."""
    cost, batch, size = side.cost, side.workload.batch, side.workload.size
    linear_flops = 2 * batch * (sum(block.active for block in cost.blocks) + cost.head)
    linear = side.hardware.seconds(tokens * linear_flops, cost.read(batch * tokens) * size)
    pairs = cost.decode_flops(batch, context) - linear_flops
    elements = sum(block.kv * block.seen(context) * _reads(block, kernels) for block in cost.blocks)
    attention = side.hardware.seconds(tokens * pairs, batch * elements * size)
    copied = 2 * batch * cost.kv(context) * size if kernels.concatenates else 0
    return _with_launches(side, kernels, linear + attention + side.hardware.copy_seconds(copied))


def _reads(block: BlockCost, kernels: Kernels) -> int:
    """How often each cached key and value is read or written per step, without concatenation."""
    return 2 * block.groups + 1 if kernels.repeats and block.groups > 1 else 1


def launches(side: Side) -> float:
    """Seconds that the host takes to launch one forward pass of transformers' eager mode."""
    attention = sum(block.attention > 0 for block in side.cost.blocks)
    mlp = sum(block.mlp > 0 for block in side.cost.blocks)
    return side.hardware.launch * (attention * LAUNCHES["attention"] + mlp * LAUNCHES["mlp"])


def _with_launches(side: Side, kernels: Kernels, device: float) -> float:
    """Seconds of a forward pass whose kernels take `device` seconds.

    A GPU computes while the host launches; engines with fused kernels record a CUDA graph and launch once.
    """
    if not side.hardware.queued:
        return device + launches(side)
    return max(device, launches(side)) if kernels.concatenates else device


def _without_pairs(block: BlockCost) -> BlockCost:
    return BlockCost(block.attention, block.mlp, block.shared, experts=block.experts)
