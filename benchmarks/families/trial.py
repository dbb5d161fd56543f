"""One tiny model through everything: analyze, drop each kind of layer, generate, export, reload.

Each pruned model must equal the dense one whose branches are silenced by hooks, generate with its cache what
it generates without, and be the same after export and reload, by dropformer and by transformers' Auto class.
What `prune estimate` says from the config alone must be the parameters of the checkpoint written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from families.tiny_models import VOCAB
from torch import nn

import dropformer
from dropformer import api
from dropformer.eval.cost.counting import cost_of_config
from dropformer.eval.cost.model_cost import ModelCost
from dropformer.metrics.analysis.analyze import analyze_model
from dropformer.prune.architecture import Architecture, Layer, Stack
from dropformer.prune.choosing import choose
from dropformer.prune.discovery.discover import discover
from dropformer.prune.discovery.proof import prove
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import ArchitectureError, ModelError, PlanError
from dropformer.prune.formats.export import reference
from dropformer.prune.outline import Outline
from dropformer.prune.samples.inputs import sample_inputs
from dropformer.prune.samples.modalities import with_images

NEW_TOKENS = 4
SILENT = "the sample's output is the same without"


class Partly(Exception):
    """Some kind of layer works, another is refused."""


class Wrong(Exception):
    """A pruned model that is not what it should be."""


@dataclass(frozen=True)
class Trial:
    """A dense model with what was found in it, and the inputs that it is tried on.

    `generates`: its cached generation can be compared; `auto`: the Auto class that must load its checkpoints.
    """

    dense: nn.Module
    architecture: Architecture
    outline: Outline
    inputs: dict[str, Any]
    folder: Path
    generates: bool
    auto: str
    cost: ModelCost | None


def through(dense: nn.Module, folder: Path, auto: str = "AutoModelForCausalLM") -> str:
    """Take a model through everything, with files in `folder`; what was dropped, and what there is to say of it.

    Raises Wrong, Partly, or a DropformerError where it is refused.
    """
    dense.save_pretrained(folder / "dense")
    given, note = _inputs(dense, auto)
    architecture = discover(dense, given)
    prove(dense, architecture, given)
    analyze_model(dense, [given], architecture)
    opened = api.LoadedModel(
        dropformer.load(folder / "dense"), None, folder / "dense", _reference(folder / "dense"), None
    )
    _same(outputs(opened.model, given), outputs(dense, given), "transformers' own reload of the dense model")
    outline = summarize(opened.model, architecture)
    trial = Trial(
        opened.model, architecture, outline, given, folder, _generates(dense, given), auto, _cost(opened.model, auto)
    )
    tried, notes, refused = [], [note], []
    if dense.can_generate() and not trial.generates:
        notes.append("no cached generation to compare")
    for stack in architecture.stacks:
        for kind in ("attn", "cross", "mlp", "block"):
            if layers := _some(stack, kind, outline):
                try:
                    notes.append(_drop(trial, opened, layers))
                    tried.append(_spec(layers))
                except ArchitectureError as error:
                    refused.append(f"{_spec(layers)}: {error}")
    if refused and not tried:
        raise ArchitectureError(refused[0])
    if refused:
        raise Partly(f"{', '.join(tried)} work; {refused[0]}")
    blocks = [block for stack in architecture.stacks for block in stack.blocks]
    for kind in sorted({kind for block in blocks for kind in block.kept} - {x.kind for x in architecture.layers()}):
        reason = next(block.kept[kind] for block in blocks if kind in block.kept)
        raise Partly(f"{', '.join(tried)} work; {kind} of every block stays: {reason}")
    notes += sorted({reason for block in blocks for reason in block.kept.values()})[:1]
    return "; ".join([", ".join(tried), *filter(None, dict.fromkeys(notes))])


def _drop(trial: Trial, opened: api.LoadedModel, layers: list[Layer]) -> str:
    """Drop these layers and check all that must hold; the surgery's note."""
    plan = api.plan_unscored(opened.ref, trial.outline, _spec(layers), (), None)
    pruned = api.drop(opened, plan)
    _check(trial, layers, pruned)
    if torch.allclose(outputs(pruned, trial.inputs), outputs(trial.dense, trial.inputs), rtol=0, atol=1e-6):
        return f"{SILENT} {_spec(layers)}"  # BLT's patcher only says where patches begin
    return pruned.dropformer.surgery.note


def _check(trial: Trial, layers: list[Layer], pruned: nn.Module) -> None:
    what, given, out = _spec(layers), trial.inputs, trial.folder / _spec(layers)
    with silenced(trial.dense, trial.architecture, layers):
        want = outputs(trial.dense, given)
    got = outputs(pruned, given)
    _same(got, want, f"{what}: dropping against silencing")
    if trial.generates:
        _same_generation(pruned, given, what)
    api.save(pruned, out)
    again = dropformer.load(out)
    _same(outputs(again, given), got, f"{what}: reload against memory")
    if type(again).__name__.removeprefix("Dropformer") != type(trial.dense).__name__:
        raise Wrong(f"{what}: reloaded as {type(again).__name__}")
    stock = getattr(transformers, trial.auto).from_pretrained(out).eval()
    if type(stock).__name__ == type(again).__name__:  # AutoModelForCausalLM may know a family by its text part
        _same(outputs(stock, given), got, f"{what}: {trial.auto} against memory")
    if trial.cost and not layers[0].stack:
        said, written = trial.cost.without(layers).parameters, sum(p.numel() for p in again.parameters())
        if said != written:
            raise Wrong(f"{what}: an estimate says {said} parameters, the checkpoint has {written}")
    if trial.generates and layers[0].kind in ("attn", "cross"):
        _same_generation(again, given, f"{what}, reloaded")


def _cost(model: nn.Module, auto: str) -> ModelCost | None:
    """The dense model's cost from its config; None for what `prune estimate` does not take."""
    try:
        return cost_of_config(model.config) if auto == "AutoModelForCausalLM" else None
    except ModelError:  # a composite config that names a class built from its text part alone
        return None


@contextmanager
def silenced(model: nn.Module, architecture: Architecture, layers: list[Layer]) -> Iterator[None]:
    """Inside the `with`, the layers' branches give zeros and whole blocks give their input, by hooks alone."""
    with ExitStack() as hooks:
        for layer in layers:
            block = architecture.block(layer)
            forms = {"": block.form} if layer.kind == "block" else architecture.branches(layer)[0].modules
            for name, form in forms.items():
                module = model.get_submodule(f"{block.path}.{name}" if name else block.path)
                hook = module.register_forward_hook(_silencer(form), with_kwargs=True)
                hooks.callback(hook.remove)
        yield


def _silencer(form: Any) -> Any:
    def replace(form: Any, value: Any, args: tuple, kwargs: dict) -> Any:
        if not isinstance(form, str) or not isinstance(value, torch.Tensor):
            return value
        word, _, key = form.partition(":")
        if word.startswith("zeros"):
            return torch.zeros_like(value)
        given = {**dict(enumerate(args)), **kwargs}
        return given[int(key) if key.isdecimal() else key] if key else value

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if isinstance(form, dict) and "norm" in form:
            norm = module.get_submodule(form["norm"])
            given = _silencer(form["of"])(module, args, kwargs, output)
            return tuple(g if g is None or g is o else norm(g) for g, o in zip(given, output, strict=True))
        if isinstance(form, list):
            return tuple(replace(f, v, args, kwargs) for f, v in zip(form, output, strict=True))
        if isinstance(form, dict) and "list" in form:
            return [replace(f, v, args, kwargs) for f, v in zip(form["list"], output, strict=True)]
        if isinstance(form, dict):
            fields = form["fields"]
            return type(output)(**{k: replace(f, getattr(output, k), args, kwargs) for k, f in fields.items()})
        return replace(form, output, args, kwargs)

    return hook


def _some(stack: Stack, kind: str, outline: Outline) -> list[Layer]:
    """One or two layers of a kind in a stack."""
    found = [layer for layer in stack.layers() if layer.kind == kind]
    pairs = [found[1:3], found[-2:]] if len(found) > 3 else []
    if kind == "block" and pairs:  # the last one too: nothing after it gets another number, yet the count changes
        pairs = [[found[1], found[-1]], [found[0], found[-1]], *pairs[::-1]]
    return next((pair for pair in [*pairs, found[-1:]] if pair and _allowed(outline, pair)), [])


def _allowed(outline: Outline, layers: list[Layer]) -> bool:
    """Does the plan leave attention, and keys and values where the model has some?"""
    try:
        return bool(choose(outline, _spec(layers)))
    except PlanError:
        return False


def _spec(layers: list[Layer]) -> str:
    name = f"{layers[0].stack}.{layers[0].kind}" if layers[0].stack else layers[0].kind
    return f"{name}={','.join(str(layer.index) for layer in layers)}"


def _inputs(model: nn.Module, auto: str) -> tuple[dict[str, Any], str]:
    """Forward arguments of a sample batch, with token ids of our own in it where it takes some, and a note.

    A vision-language model gets images too, so that its vision tower is tried.
    """
    if auto == "AutoModelForImageTextToText":
        try:
            return with_images(model), ""
        except ArchitectureError as error:
            note = f"the language stack alone: {str(error).partition(',')[0]}"
            return sample_inputs(model), note
    found = sample_inputs(model)
    if "input_ids" not in found:
        return found, ""
    rows, length = found["input_ids"].shape[0], max(9, found["input_ids"].shape[1])
    ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
    return {**found, "input_ids": ids.repeat(-(-rows // 2), 1)[:rows]}, ""  # one row where a head knows no padding


@torch.no_grad()
def outputs(model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    """What the model gives first, its logits where it has a head."""
    return model(**given)[0].float()


@torch.no_grad()
def _generation(model: nn.Module, given: dict[str, Any], use_cache: bool) -> torch.Tensor:
    start = {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
    made = model.generate(
        **{name: value for name, value in given.items() if name in ("input_ids", "pixel_values")},
        **start,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(made.logits).float()


def _generates(model: nn.Module, given: dict[str, Any]) -> bool:
    """Does the dense model generate with its cache what it generates without?"""
    try:
        return _close(_generation(model, given, True), _generation(model, given, False))
    except Exception:  # families that only generate from audio or with a target model
        return False


def _same_generation(model: nn.Module, given: dict[str, Any], what: str) -> None:
    _same(_generation(model, given, True), _generation(model, given, False), f"{what}: cached against uncached")


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(1.0))


def _same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    if not _close(a, b):
        by = f"by {(a - b).abs().max():.2g}" if a.shape == b.shape else "in shape"
        raise Wrong(f"{what} differs {by}")


def _reference(folder: Path) -> Any:
    return reference(folder.name, folder)
