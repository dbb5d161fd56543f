"""What a drop saves on a device, from the config alone, without weights.

The model's blocks are traced on the meta device, so parameters, experts and KV bytes are exact, and branches own the
same parameters as in the exported checkpoint; times are a roofline (`roofline`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from dropformer.eval.cost.encoder import ForwardEstimate, forward_pass, side_by_side, with_agents
from dropformer.eval.cost.hardware import Hardware
from dropformer.eval.cost.model_cost import ModelCost
from dropformer.eval.cost.roofline import KERNELS, Side, Workload, launches, step_seconds
from dropformer.prune.architecture import Layer
from dropformer.prune.choosing import PublishedLists, choose_forms, choose_windows
from dropformer.prune.errors import ModelError, PlanError
from dropformer.prune.files.config_json import CONFIG, check_plausible
from dropformer.prune.files.output_paths import cache_folder
from dropformer.prune.files.strict_json import read_object
from dropformer.prune.outline import Outline
from dropformer.prune.spec import without_windows
from dropformer.prune.window import Window
from dropformer.recipes import Recipe, open_config, recipes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHIPPED = Path(__file__).parents[2] / "recipes" / "costs"


@dataclass(frozen=True)
class Speedup:
    """Speed-up over the dense model: prefill, decode, and both together."""

    prefill: float
    decode: float
    generation: float


@dataclass(frozen=True)
class Estimate:
    """The dense model beside the pruned one."""

    dense: Side
    pruned: Side

    def speedup(self, kernels: str = "fused") -> Speedup:
        before, after = self.dense.times[kernels], self.pruned.times[kernels]
        return Speedup(
            before.prefill / after.prefill, before.decode / after.decode, before.generation / after.generation
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
    spec: str,
    hardware: Hardware,
    workload: Workload | None = None,
    published: PublishedLists | None = None,
) -> Estimate:
    """Estimate what dropping layers changes.

    config: a transformers config, its dictionary (with `model_type`), or a cost already counted.  spec: a drop spec,
    or "" for none.  A count selects the deepest layers except the last, like published lists; in most models all
    layers cost the same, so the selection does not matter.  Raises ModelError for a config that is not a causal
    language model's, ArchitectureError if no layer can be dropped, PlanError as a plan does.
    """
    if not isinstance(config, ModelCost):
        from dropformer.eval.cost.counting import cost_of_config

        config = cost_of_config(config)
    if config.tokens:
        raise ModelError(
            "an encoder is no causal language model: it has no prefill and no decoding; use forward_estimate"
        )
    layers, maps, rungs = _chosen(config.outline, spec, published)
    workload = workload or Workload()
    pruned = config.windowed(decoder_windows(rungs)).without(layers, maps)
    return Estimate(Side(config, workload, hardware), Side(pruned, workload, hardware))


def decoder_windows(rungs: Mapping[Layer, Any]) -> dict[Layer, Window]:
    """The windows of a spec.  Raises PlanError for agents, which no causal attention takes."""
    if agents := next((layer for layer, rung in rungs.items() if not isinstance(rung, Window)), None):
        raise PlanError(f"{agents}@{rungs[agents]}: agents are averages of all tokens, and this model is causal")
    return dict(rungs)


def forward_estimate(
    cost: ModelCost, spec: str, hardware: Hardware, tokens: int | None = None, batch: int = 1, dtype: str = "bfloat16"
) -> ForwardEstimate:
    """What a drop spec changes in a forward pass of an encoder.  `tokens`: by default those of its own input.

    A count selects as `estimate` does.  Raises PlanError and EvaluationError.
    """
    layers, maps, rungs = _chosen(cost.outline, spec)
    if maps:
        raise PlanError(f"{maps[0]}: linear maps are fitted to causal language models alone; drop the layer instead")
    pruned = with_agents(cost, rungs).without(layers)
    return ForwardEstimate(*(forward_pass(each, tokens, batch, dtype, hardware) for each in (cost, pruned)))


def _chosen(
    outline: Outline, spec: str, published: PublishedLists | None = None
) -> tuple[list[Layer], list[Layer], dict[Layer, Any]]:
    """The layers that a spec drops, those of them that become linear maps, and the rungs of those that stay."""
    drops = without_windows(spec) if spec else ""
    layers, maps = choose_forms(outline, drops, published=published, pick=_deepest) if drops else ([], [])
    return layers, maps, choose_windows(outline, spec, layers, _depths(outline)) if spec else {}


def _depths(outline: Outline) -> dict[Layer, float]:
    """Scores of attention layers that rank windows in the order of `_deepest`."""
    found = [layer for stack in outline.stacks for layer in outline.layers("attn", stack.name)]
    return {layer: -1.0 if layer.index == max(l.index for l in found) else float(layer.index) for layer in found}


def _deepest(free: Sequence[Layer], count: int, _: Sequence[Layer]) -> list[Layer]:
    """The deepest of the free layers; the last block's come last."""
    last = max(layer.index for layer in free)
    return sorted(free, key=lambda layer: (layer.index == last, -layer.index, layer.kind))[:count]


def cost_of_name(name: str) -> ModelCost:
    """The cost of a model by recipe name, folder or Hub id; a recipe that holds a config needs no network.

    Costs of recipes come with the package (`make costs`), others are kept in the cache folder: a second estimate of
    the same config imports neither torch nor transformers.  Raises ModelError if the model cannot be found.
    """
    known = recipes().get(name)
    if known is not None and known.config:
        if cost := shipped_cost(name, known.config):
            return cost
        return _kept(json.dumps(dict(known.config), sort_keys=True), partial(_count, dict(known.config)))
    path = open_config(name).path
    check_plausible(read_object(path / CONFIG), path)
    return _kept((path / "config.json").read_text(encoding="utf-8"), partial(_count, path))


def shipped_cost(name: str, config: Mapping[str, Any]) -> ModelCost | None:
    """The cost of a recipe's config shipped with the package; None if there is none of exactly this config."""
    try:
        kept = json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    return TypeAdapter(ModelCost).validate_python(kept["cost"]) if kept["config"] == _digest(config) else None


def write_costs() -> None:
    """Recount every recipe with a config, for the package (`make costs`)."""
    SHIPPED.mkdir(exist_ok=True)
    for name, recipe in recipes().items():
        if recipe.config:
            cost = TypeAdapter(ModelCost).dump_python(_count(dict(recipe.config)), mode="json")
            kept = json.dumps({"config": _digest(recipe.config), "cost": cost}, separators=(",", ":"))
            (SHIPPED / f"{name}.json").write_text(kept + "\n", encoding="utf-8")


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode()).hexdigest()[:16]


def _count(config: dict[str, Any] | Path) -> ModelCost:
    from dropformer.eval.cost.counting import cost_of_config
    from dropformer.prune.loading.load import read_model_config

    return cost_of_config(read_model_config(config) if isinstance(config, Path) else config)


def _kept(config: str, count: Callable[[], ModelCost]) -> ModelCost:
    """The cost of a config from the cache folder, else counted and cached."""
    sources = sorted(Path(__file__).parents[2].glob("prune/discovery/*.py")) + sorted(
        Path(__file__).parent.glob("*.py")
    )
    parts = [config.encode(), version("transformers").encode(), *(path.read_bytes() for path in sources)]
    path = cache_folder() / "costs" / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.json"
    adapter = TypeAdapter(ModelCost)
    try:
        return adapter.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        cost = count()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(adapter.dump_json(cost))
        temporary.replace(path)
    except OSError:
        pass  # an unwritable cache only costs time
    return cost


def published_speedup(recipe: Recipe | None, spec: str) -> float | None:
    """The published speed-up of this drop spec, such as `attn:40`, or None."""
    for result in recipe.results if recipe else ():
        if result.drop == spec.replace(" ", ""):
            return result.speedup
    return None


KERNEL_TITLES = {
    "fused": "fused kernels (FlashAttention, vLLM)",
    "sdpa": "transformers, cache concatenated",
    "eager": "transformers, eager attention",
}


def estimate_lines(estimate: Estimate, published: float | None = None) -> list[str]:
    """Lines for the terminal.  published: the measured speed-up of the same drop, if known."""
    dense, pruned = estimate.dense, estimate.pruned
    sides, load = (dense, pruned), dense.workload
    lines = [
        str(dense.hardware),
        f"batch {load.batch}, {load.prompt} + {load.new} tokens, {load.dtype}",
        side_by_side("", "dense", "pruned"),
        side_by_side("parameters", *(f"{side.parameters / 1e9:.3f} G" for side in sides)),
    ]
    if dense.active_parameters != dense.parameters:
        lines.append(side_by_side("active", *(f"{side.active_parameters / 1e9:.3f} G" for side in sides)))
    lines += [
        side_by_side("checkpoint", *(_bytes(side.checkpoint_bytes) for side in sides)),
        side_by_side("KV cache", *(_bytes(side.kv_bytes) for side in sides)),
        side_by_side("devices needed", str(dense.devices), str(pruned.devices)),
        side_by_side("prefill", *(f"{side.prefill_flops / 1e12:.4g} TFLOP" for side in sides)),
        side_by_side("decode step", *(f"{side.decode_flops / 1e12:.4g} TFLOP" for side in sides)),
    ]
    for name in KERNELS:
        speedup = estimate.speedup(name)
        lines.append(side_by_side(f"prefill + decode, {name}", *(_seconds(side, name) for side in sides)))
        lines.append(
            f"  {KERNEL_TITLES[name]}: {speedup.generation:.2f}x in all "
            f"(prefill {speedup.prefill:.2f}x, decode {speedup.decode:.2f}x)"
        )
    host = launches(dense)
    if dense.hardware.queued and step_seconds(dense, KERNELS["sdpa"], load.prompt) <= host:
        lines.append(
            f"  transformers takes {1e3 * host:.3g} ms to launch a decode step, as long as its kernels run or longer; "
            "CUDA graphs (torch.compile, vLLM) lift that"
        )
    if published is not None:
        lines.append(f"  published, measured: {published:.2f}x")
    return lines


def _seconds(side: Side, kernels: str) -> str:
    times = side.times[kernels]
    return f"{times.prefill:.3g} + {times.decode:.4g} s"


def _bytes(count: int) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count / 2**10:.4g} KiB"
