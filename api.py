"""The public functions: analyze, plan, drop, draft, save, load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from torch import nn
from transformers import PreTrainedModel

from dropformer.metrics.analysis.analyze import analyze_model, calibrated
from dropformer.metrics.analysis.planning import plan_from as plan
from dropformer.metrics.analysis.planning import spec_windows
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.calibration.batching import samples_at_once
from dropformer.metrics.calibration.data import calibration_data, default_settings
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.repair.base import Repair, check_fitted
from dropformer.progress import Tick
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.artifact import ModelRef
from dropformer.prune.block_map import Surgery
from dropformer.prune.choosing import PublishedLists, choose_forms
from dropformer.prune.discovery.proof import outline as outline
from dropformer.prune.draft.generation import DRAFT_TOKENS, set_drafting, speculation
from dropformer.prune.errors import ModelError, OutputError, PlanError
from dropformer.prune.files.config_json import read_config
from dropformer.prune.formats.export import export, save_in_memory
from dropformer.prune.formats.record import need_dense
from dropformer.prune.formats.writing import Exported, ExportOptions
from dropformer.prune.loading.load import load
from dropformer.prune.outline import Outline
from dropformer.prune.plan import Plan, make_plan
from dropformer.prune.spec import without_windows
from dropformer.prune.surgery.stored_tensors import stored_dtype
from dropformer.prune.surgery.surgery import apply_surgery, plan_surgery
from dropformer.prune.surgery.views import proven, sharing_copy
from dropformer.recipes.opening import LoadedModel, open_model
from dropformer.recipes.placement import Placement
from dropformer.request import recipe_calibration

RECORD = "dropformer"  # the attribute of a model that `drop` returns
__all__ = [
    "Calibration", "LoadedModel", "Placement", "analyze", "draft", "drop", "load", "open_model", "plan", "save",
    "speculate_with",
]  # fmt: skip


def analyze(
    model: str | Path | LoadedModel | nn.Module,
    batches: Iterable[Any] | None = None,
    calibration: Calibration | None = None,
    batch_size: int | None = None,
    progress: Tick | None = None,
    architecture: Architecture | None = None,
) -> Scores:
    """Similarity of every block, attention layer and MLP layer, from one forward pass over the calibration data.

    `model` is a name as for `--model`, with `calibration` (default: the recipe's, else builtin; random pixels for an
    image model), or any torch module with `batches` of its inputs (tensors or mappings, batch first).
    `architecture`: the result of `describe` or `discover`; it is proven on the first batch, and plan and drop use it.
    Raises ModelError, ArchitectureError or CalibrationError.
    """
    if isinstance(model, nn.Module):
        if batches is None:
            raise ModelError("analyze(module) needs batches of its inputs; give analyze(module, batches)")
        return analyze_model(model, batches, architecture, progress=progress)
    if architecture is not None:
        raise ModelError("an architecture belongs to a module in memory; give analyze(module, batches, architecture=)")
    opened = model if isinstance(model, LoadedModel) else open_model(model)
    settings = calibration or default_settings(opened.model, recipe_calibration(opened.recipe))
    data = calibration_data(opened.model, opened.tokenizer, opened.path, settings)
    scores = analyze_model(
        opened.model, data.batches(batch_size or samples_at_once(opened.model, data)), ref=opened.ref, progress=progress
    )
    return calibrated(scores, data)


def plan_unscored(
    ref: ModelRef,
    outline: Outline,
    spec: str,
    keep: Sequence[int],
    published: PublishedLists | None,
    losses: Mapping[Layer, float] | None = None,
) -> Plan:
    """A plan from explicit or published lists, without scores; `losses` rank windows.  Raises PlanError."""
    drops = without_windows(spec)
    layers, maps = choose_forms(outline, drops, None, keep, published) if drops else ([], [])
    windows = spec_windows(outline, spec, layers, losses, keep)
    return make_plan(outline, ref, spec, layers, rungs=windows, keep=list(keep), maps=[str(m) for m in maps])


@overload
def drop(
    model: str | Path | LoadedModel | PreTrainedModel, plan: Plan, repair: Repair | None = None
) -> PreTrainedModel: ...


@overload
def drop(model: nn.Module, plan: Plan, repair: Repair | None = None) -> nn.Module: ...


def drop(model: str | Path | LoadedModel | nn.Module, plan: Plan, repair: Repair | None = None) -> nn.Module:
    """A new model without the plan's layers that shares the kept weights with the given one.

    Dropped layers have no compute and no KV cache.  `repair`, from `improve`, gives some of the kept layers new
    weights, rounded to the checkpoint's dtype.  The result's attribute `dropformer` is a `DropRecord`, which `save`
    reads.  Raises PlanError if the plan was made for other weights, or has linear maps that `repair` lacks.
    """
    if isinstance(model, (str, Path)):
        model = open_model(model)
    opened, dense = (model, model.model) if isinstance(model, LoadedModel) else (None, model)
    if opened and plan.model.fingerprint and plan.model.fingerprint != opened.ref.fingerprint:
        raise PlanError(f"the plan was made for other weights than {opened.ref.name}; analyze this model first")
    if opened:
        need_dense(read_config(opened.path), opened.ref.name)
    check_fitted(plan, repair)
    pruned = sharing_copy(dense)
    mapped, folder = repair.mapped if repair else None, opened.path if opened else None
    surgery = plan_surgery(plan.outline, plan.layers, dense, mapped, plan.rungs, folder)
    surgery = proven(dense, surgery)
    if repair and (named := repair.named(plan.outline, surgery.block_map)):
        dtype = stored_dtype(opened.path) if opened else next(dense.parameters()).dtype
        surgery = replace(surgery, tensors={name: tensor.to(dtype) for name, tensor in named.items()})
    apply_surgery(pruned, surgery)
    files = (opened.path, opened.file) if opened else (None, None)
    setattr(pruned, RECORD, DropRecord(plan, surgery, *files))
    return pruned


def draft(
    model: str | Path | LoadedModel | PreTrainedModel,
    plan: Plan,
    tokens: int | None = None,
    repair: Repair | None = None,
) -> PreTrainedModel:
    """A draft for speculative decoding: the model that `drop` returns, set to draft `tokens` tokens per round.

    `tokens` defaults to the plan's.  The draft shares every kept tensor with the dense model, which is unchanged.
    `model.generate(assistant_model=draft)` gives the dense model's text, and so does
    `model.generate(custom_generate=speculate_with(draft))`, which also shares the KV cache.  Raises as `drop`,
    PlanError for less than one token, and ModelError for a model that generates no text.
    """
    made = drop(model, plan, repair)
    if not isinstance(made, PreTrainedModel) or not made.can_generate():
        raise ModelError(f"{type(made).__name__} generates no text, so nothing can be drafted for it")
    planned = plan.draft.tokens if plan.draft else DRAFT_TOKENS
    set_drafting(made, planned if tokens is None else tokens)
    return made


def speculate_with(draft: PreTrainedModel, counts: list[tuple[int, int]] | None = None) -> Callable[..., Any]:
    """A function for `model.generate(custom_generate=...)` with which the draft shares the dense model's KV cache.

    `counts` receives (drafted, accepted) per round.  Batch 1, like transformers' assisted decoding.  Raises
    OutputError for a model that `draft` did not return, ModelError for a decoder with several stacks.
    """
    return speculation(draft, drop_record(draft).surgery, counts)


@dataclass(frozen=True)
class DropRecord:
    """The attribute `dropformer` that `drop` sets on a model, for `save`.

    `plan`: the dropped layers, by original index; `surgery`: the changes to the model, with the new weights of a
    repair; `source`: the folder of the dense weights, None for a module without one; `gguf`: the file from which that
    folder was converted, if any.  It is not saved with the model: the checkpoint has `plan.json`.
    """

    plan: Plan
    surgery: Surgery
    source: Path | None
    gguf: Path | None = None


def drop_record(model: nn.Module) -> DropRecord:
    """The `DropRecord` of a model that `drop` returned.  Raises OutputError for any other."""
    made = getattr(model, RECORD, None)
    if not isinstance(made, DropRecord):
        raise OutputError("this takes the model that drop returned; drop layers first")
    return made


def save(model: nn.Module, out: str | Path, format: str = "dropformer", progress: Tick | None = None) -> Exported:
    """Write a pruned model as a checkpoint, reload it, and keep it only if it gives the same logits.

    Kept tensors are copied from the dense checkpoint byte for byte; a model without a checkpoint is written from
    memory.  `format` is one of `prune.formats.FORMATS`.  Raises OutputError, CheckpointError, PlanError (if the format
    cannot represent the model) or VerificationError.
    """
    made = drop_record(model)
    if not isinstance(model, PreTrainedModel):
        raise OutputError("save takes a transformers model; save the state_dict of any other module yourself")
    if made.source is not None:
        how = ExportOptions(format, gguf=made.gguf, progress=progress)
        return export(model, made.surgery, made.plan, made.source, Path(out), how)
    if format != "dropformer":
        raise OutputError(
            f"format `{format}` is made from a checkpoint's files, and this model has none; save it first"
        )
    return save_in_memory(model, made.surgery, made.plan, Path(out))
