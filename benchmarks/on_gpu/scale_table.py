"""What `--quality best` of attention layers costs large Llamas, by the formula of docs/quality.md.

python benchmarks/scale.py --table
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
TOKENS = 64 * 512  # of the calibration
BATCH = 8192  # tokens that pass a block at once
PASSES = 5.5  # of `best`, measured by benchmarks/scale.py (3.7 to 5.5)
USED = 0.4  # of a GPU's peak in matrix products
GROUPS, MATRICES = 3, 7  # groups of windows whose moments are summed; K x K matrices that a fit holds in all
TRIED = 2.5  # penalties tried for a slot, each a factorization for every group, and one in the end


@dataclass(frozen=True)
class Model:
    """A Llama: parameters, blocks, width, MLP width and heads' width of keys and values."""

    name: str
    parameters: float
    blocks: int
    width: int
    inner: int
    vocabulary: int


@dataclass(frozen=True)
class Machine:
    """GPUs: memory of all, peak of one in bfloat16 and in float32 (FLOP/s), bytes a second from the host."""

    name: str
    count: int
    memory: int
    half: float
    single: float
    bus: float


MODELS = (
    Model("Llama-3-8B", 8.03e9, 32, 4096, 14336, 128256),
    Model("Llama-2-13B", 13.0e9, 40, 5120, 13824, 32000),
    Model("Llama-2-70B", 69.0e9, 80, 8192, 28672, 32000),
)
MACHINES = (
    Machine("one 24 GB GPU", 1, 24 * 10**9, 165e12, 80e12, 20e9),
    Machine("one 80 GB GPU", 1, 80 * 10**9, 600e12, 60e12, 50e9),
    Machine("four 80 GB GPUs", 4, 320 * 10**9, 600e12, 60e12, 50e9),
)


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU and on the host, and seconds; `fits`: the weights stay on the GPUs."""

    device: float
    host: float
    seconds: float
    fits: bool


def estimate(model: Model, machine: Machine, dropped: int) -> Estimate:
    """Cost of dropping attention layers by `best`: 2 x dropped MLP slots fitted for the search, then every slot
    behind the first gap, for which all of the depth is counted.

    A slot of K inputs and D outputs on N tokens: N K^2 (7/12 of 2 N K^2) and 2 N K D for the moments, K^3 / 3 for a
    factorization and 2 K^2 D for the change, all in float32.  A block-step moves the weights in from the host where
    they do not fit.  Example: K 14,336, D 4,096, N 32,768: 7.9 + 3.8 TFLOP, 8.5 factorizations of 1 TFLOP, 1.7 TFLOP.
    """
    weights = 2 * model.parameters
    block = (weights - 4 * model.vocabulary * model.width) / model.blocks
    workspace = 4 * MATRICES * model.inner**2 + 4 * (2 + GROUPS) * model.inner * model.width
    activations = BATCH * (4 * model.inner + 8 * model.width) * 2 + 4 * BATCH * model.inner
    beside = workspace + activations
    fits = weights / machine.count + beside < 0.95 * machine.memory / machine.count
    held = weights / machine.count if fits else 2 * block + 4 * model.vocabulary * model.width
    streams = 4 * 2 * TOKENS * model.width + 3 * 2 * TOKENS * model.inner
    changes = 2 * model.width * (model.inner * (2 * dropped + model.blocks) + model.width * model.blocks)
    forward = PASSES * 2 * model.parameters * TOKENS / (USED * machine.half)
    slots = [(model.inner, 2 * dropped + model.blocks), (model.width, model.blocks)]
    solved = sum(count * _slot(k, model.width) for k, count in slots) / (USED * machine.single)
    moved = 0.0 if fits else (PASSES + 3 * dropped) * weights / machine.bus
    return Estimate(held + beside, streams + changes + (0 if fits else weights), forward + solved + moved, fits)


def _slot(inputs: int, outputs: int) -> float:
    """FLOP of one slot's moments and fit."""
    moments = 7 / 12 * 2 * TOKENS * inputs**2 + 2 * TOKENS * inputs * outputs
    return moments + (GROUPS * TRIED + 1) * inputs**3 / 3 + 2 * inputs**2 * outputs


def table(share: float = 0.25) -> str:
    """The costs of dropping a quarter of the attention layers, as a Markdown table."""
    lines = ["| model | machine | GPU memory, each | host memory | minutes |", "|---|---|---:|---:|---:|"]
    for model in MODELS:
        for machine in MACHINES:
            cost = estimate(model, machine, round(model.blocks * share))
            if cost.device > 0.95 * machine.memory / machine.count:
                lines.append(f"| {model.name} | {machine.name} | does not fit | | |")
                continue
            how = "" if cost.fits else " (weights on the host)"
            lines.append(
                f"| {model.name} | {machine.name}{how} | {cost.device / GIB:.0f} GiB | {cost.host / GIB:.0f} GiB "
                f"| {cost.seconds / 60:.0f} |"
            )
    return "\n".join(lines)
