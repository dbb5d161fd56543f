"""Costs of a draft step and a verifying pass, in dense decode steps: by the roofline, or timed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from dropformer.eval.cost.hardware import Hardware
from dropformer.eval.cost.model_cost import ModelCost
from dropformer.eval.cost.roofline import KERNELS, Side, Workload, step_seconds
from dropformer.eval.cost.timing import Clock
from dropformer.metrics.draft.acceptance import shortened
from dropformer.prune.architecture import Layer
from dropformer.prune.draft.grouped_queries import grouped_queries
from dropformer.prune.draft.shared_cache import view_of
from dropformer.prune.loading.device import gpus_of
from dropformer.prune.window import Window

REPEATS = 7  # of timed steps


@dataclass(frozen=True)
class Steps:
    """Roofline costs of decode steps of one model on a device, at one context and batch.

    A verifying pass of m tokens reads weights and cache once and computes m times as much.
    """

    cost: ModelCost
    hardware: Hardware
    workload: Workload
    kernels: str = "fused"

    def draft(self, layers: Sequence[Layer], windows: Mapping[Layer, Window]) -> float:
        """c: time of a step without these layers and with these windows, over a dense step."""
        return self._seconds(self.cost.windowed(windows).without(layers)) / self._seconds(self.cost)

    def verify(self, tokens: int) -> float:
        """v: time of a dense pass over `tokens` tokens, over a dense step."""
        return self._seconds(self.cost, tokens) / self._seconds(self.cost)

    def _seconds(self, cost: ModelCost, tokens: int = 1) -> float:
        side = Side(cost, self.workload, self.hardware)
        return step_seconds(side, KERNELS[self.kernels], self.workload.context, tokens)


@dataclass(frozen=True)
class MeasuredSteps:
    """Median seconds of a dense step, a draft step, a dense pass over the drafted tokens and one more.

    view: of making the draft's view of the cache, once per round.
    """

    dense: float
    draft: float
    verify: float
    view: float = 0.0

    @property
    def cost(self) -> float:
        return self.draft / self.dense

    @property
    def verify_cost(self) -> float:
        """v: cost of a round without its draft steps."""
        return (self.verify + self.view) / self.dense


@torch.inference_mode()
def measured_steps(
    models: tuple[PreTrainedModel, PreTrainedModel, Sequence[int]], ids: Tensor, cache: Cache, drafted: int
) -> MeasuredSteps:
    """Time dense steps and rounds of a draft after the dense model's cache of `ids` [1, T], in turn, after one warm-up.

    Each cache owns its memory and is cut back after a step, as in a run: a step that grows a cache which something
    else holds too takes new memory from the system every time, which costs as much again.
    models: dense, draft, and the draft's sources as `view_of` takes them.
    """
    dense, draft, sources = models
    length, clock = ids.shape[1] - drafted - 1, Clock(gpus_of(dense))
    took: dict[str, list[float]] = {"dense": [], "view": [], "draft": [], "verify": []}
    alone, behind = (shortened(cache, length) for _ in range(2))
    for past in (alone, behind):
        past.activate_past_recording()

    def read(model: PreTrainedModel, past: Cache, start: int, end: int) -> None:
        model(input_ids=ids[:, start:end], past_key_values=past, use_cache=True)

    for turn in range(REPEATS + 1):
        with grouped_queries():  # as `speculation` runs them
            found = {"dense": clock.timed(partial(read, dense, alone, length, length + 1))[1].wall}
            view, making = clock.timed(partial(view_of, behind, draft, sources))
            steps = [
                clock.timed(partial(read, draft, view, at, at + 1))[1].wall for at in range(length, length + drafted)
            ]
            found |= {"view": making.wall, "draft": statistics.mean(steps)}
            found["verify"] = clock.timed(partial(read, dense, behind, length, length + drafted + 1))[1].wall
        alone.crop(-1)
        behind.crop(-drafted - 1)
        for name, seconds in found.items() if turn else ():
            took[name].append(seconds)
    return MeasuredSteps(**{name: statistics.median(values) for name, values in took.items()})
