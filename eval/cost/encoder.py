"""What drops and agents save in an encoder or a vision model: one forward pass over all tokens, from the config alone.

Formulas as in `model_cost`, without a cache: T tokens have T^2 pairs in a layer of width d, at 4 d FLOPs each, with N
agents 2 N T (a query and an agent, an agent and a key).  The head counts for every token, as a masked language model's
does; so does what is outside of the blocks (a patch embedding).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dropformer.eval.cost.hardware import Hardware
from dropformer.eval.cost.model_cost import BlockCost, ModelCost
from dropformer.eval.cost.roofline import BYTES
from dropformer.prune.architecture import Layer
from dropformer.prune.errors import EvaluationError, PlanError
from dropformer.prune.rungs.agent import Agents


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass over `batch` samples of `tokens` tokens; seconds by roofline, with fused attention kernels."""

    cost: ModelCost
    tokens: int
    batch: int
    dtype: str
    hardware: Hardware

    @property
    def pair_flops(self) -> float:
        """FLOPs of attention's pairs in all blocks."""
        return self.batch * sum(4.0 * block.width * pairs(block, self.tokens) for block in self.cost.blocks)

    @property
    def flops(self) -> float:
        active = sum(block.active for block in self.cost.blocks) + self.cost.head + self.cost.other
        return 2.0 * self.batch * self.tokens * active + self.pair_flops

    @property
    def seconds(self) -> float:
        size, rows = BYTES[self.dtype], self.batch * self.tokens
        linear = self.hardware.seconds(self.flops - self.pair_flops, self.cost.read(rows) * size)
        # queries, keys, values and output once; with agents the queries twice
        moved = sum((5 if block.agents else 4) * block.width * rows for block in self.cost.blocks)
        return linear + self.hardware.seconds(self.pair_flops, moved * size)

    def as_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.cost.parameters,
            "checkpoint_bytes": self.cost.parameters * BYTES[self.dtype],
            "flops": self.flops,
            "pair_flops": self.pair_flops,
            "seconds": self.seconds,
        }


def pairs(block: BlockCost, tokens: int) -> int:
    """Query-key pairs of a block: 197 tokens and 49 agents have 2 * 49 * 197, without agents 197 * 197."""
    return 2 * block.agents * tokens if block.agents else tokens * block.seen(tokens)


@dataclass(frozen=True)
class ForwardEstimate:
    """The dense encoder beside the pruned one."""

    dense: ForwardPass
    pruned: ForwardPass

    @property
    def speedup(self) -> float:
        return self.dense.seconds / self.pruned.seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON report."""
        sides = {"dense": self.dense.as_dict(), "pruned": self.pruned.as_dict()}
        load = {"tokens": self.dense.tokens, "batch": self.dense.batch, "dtype": self.dense.dtype}
        return {**sides, **load, "speedup": self.speedup, "hardware": vars(self.dense.hardware)}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    def lines(self) -> list[str]:
        """Lines for the terminal."""
        sides = one, two = self.dense, self.pruned
        rows = [
            ("parameters", *(f"{side.cost.parameters / 1e6:.1f} M" for side in sides)),
            ("forward pass", *(f"{side.flops / 1e9:.4g} GFLOP" for side in sides)),
            ("of it pairs", *(f"{side.pair_flops / side.flops:.1%}" for side in sides)),
            ("time, fused", *(f"{side.seconds * 1e3:.3g} ms" for side in sides)),
        ]
        lines = [
            str(one.hardware),
            f"an encoder: one forward pass, batch {one.batch}, {one.tokens:,} tokens, {one.dtype}",
            side_by_side("", "dense", "pruned"),
            *(side_by_side(*row) for row in rows),
            f"  {self.speedup:.2f}x by roofline, without launches, which bind small models on short inputs",
        ]
        most = max((block.agents or 0 for block in two.cost.blocks), default=0)
        if 2 * most >= one.tokens:
            lines.append(f"  {most} agents cost more than they save up to {2 * most:,} tokens; give fewer")
        return lines


def side_by_side(name: str, *sides: str) -> str:
    """A row of an estimate: a figure's name, dense, pruned."""
    return f"{name:<16}" + "".join(f"{side:>24}" for side in sides)


def check_encoder(name: str, draft: bool, new_tokens: int | None) -> None:
    """Raises EvaluationError for options that have no effect on an encoder."""
    if draft or new_tokens:
        raise EvaluationError(f"--draft and --new-tokens have no effect on {name}, an encoder; leave them out")


def with_agents(cost: ModelCost, rungs: Mapping[Layer, Any]) -> ModelCost:
    """The cost with agents on attention layers.  Raises PlanError for windows, which an encoder does not take."""
    blocks = list(cost.blocks)
    for layer, rung in rungs.items():
        if not isinstance(rung, Agents):
            raise PlanError(f"{layer}@{rung}: windows fit causal attention, and this is an encoder")
        blocks[layer.index] = replace(blocks[layer.index], agents=rung.count)
    return replace(cost, blocks=tuple(blocks))


def forward_pass(cost: ModelCost, tokens: int | None, batch: int, dtype: str, hardware: Hardware) -> ForwardPass:
    """A forward pass over `tokens` tokens, by default those of the model's own input.  Raises EvaluationError."""
    if batch < 1 or dtype not in BYTES:
        raise EvaluationError(f"cannot estimate batch {batch} in {dtype}; expected 1 or more, and {', '.join(BYTES)}")
    return ForwardPass(cost, tokens or cost.tokens, batch, dtype, hardware)
