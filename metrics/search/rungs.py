"""A plan of rungs under a budget, from one forward pass over text of which part needs its far past."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dropformer.metrics.analysis.window_loss import rung_losses
from dropformer.metrics.search.budget import parse_budget
from dropformer.metrics.search.ladder import Option, check_rungs, climb, saved_share
from dropformer.prune.architecture import Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.choosing import check_attention_left, unprotected
from dropformer.prune.errors import ArchitectureError
from dropformer.prune.outline import Outline
from dropformer.prune.plan import Plan, make_plan
from dropformer.prune.rungs.registry import Rung
from dropformer.prune.rungs.window import Windowed
from dropformer.prune.window import Window

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dropformer.metrics.search.strategy import Target

Damages = Mapping[Layer, Mapping[Window | None, float]]


def rung_plan(
    model: nn.Module, outline: Outline, ref: ModelRef, target: Target, batches: Iterable[Mapping[str, Tensor]],
    **fields: Any,
) -> Plan:  # fmt: skip
    """The plan that meets the target's budget at its context with the least damage, attention layers alone.

    Damage: what `rung_losses` says of each layer alone, added up.  Batches: as there.  Raises PlanError where the
    budget cannot be met, ArchitectureError where no attention layer takes a window, CalibrationError.
    """
    windows = check_rungs(target.rungs, target.context)
    damages = rung_losses(model, outline, batches, windows)
    if not damages:
        raise ArchitectureError(f"no attention layer of {type(model).__name__} takes a window; give --budget alone")
    budget = parse_budget(target.budget or "")
    free = set(unprotected(outline, ("attn",), "", target.keep)).intersection(damages)
    whole = _whole(outline, damages)
    options = {
        layer: [
            Option(rung, saved_share(outline, layer, rung, budget, target.context), damages[layer][_window(rung)])
            for rung in target.rungs
            if isinstance(rung, Windowed) or layer != whole
        ]
        for layer in sorted(free)
    }
    chosen = climb(options, budget.amount)
    order = sorted(chosen, key=lambda layer: (chosen[layer].damage, -layer.index))
    dropped = [layer for layer in order if _window(chosen[layer].rung) is None]
    windowed = {layer: window for layer in order if (window := _window(chosen[layer].rung))}
    check_attention_left(outline, dropped)
    fields["metric"] = f"damage of {', '.join(map(str, target.rungs))} at {target.context:,} tokens"
    return make_plan(outline, ref, str(budget), dropped, windows=windowed, keep=list(target.keep), **fields)


def _window(rung: Rung) -> Window | None:
    return rung.window if isinstance(rung, Windowed) else None


def _whole(outline: Outline, damages: Damages) -> Layer | None:
    """The attention with keys that dropping would harm most: a model keeps one."""
    with_keys = [layer for layer in damages if outline.branch(layer).kv]
    return max(with_keys, key=lambda layer: damages[layer][None], default=None)
