"""Try every causal language model of transformers: drop, generate with a cache, export, reload.

    python benchmarks/architectures.py [--quick] [--write docs/architectures.md] [FAMILY ...]

For each family a tiny random model is built from its config, saved, and taken through analyze, drop
attention, drop MLP, drop a block; each pruned model must equal the dense one whose branches are silenced
by hooks, generate with its cache what it generates without, and be the same after export and reload.
A family is `works`, `partly` (some kind of layer is refused, with the reason), `refused` or `wrong`; one
that transformers cannot build here is left out and named.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures_page import Verdict, count, decoder_only, document
from tiny_models import VOCAB, tiny_model
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import dropformer
from dropformer import api
from dropformer.metrics.analyze import analyze_model
from dropformer.prune.architecture import Architecture, Layer
from dropformer.prune.discover import discover
from dropformer.prune.errors import DropformerError, PlanError
from dropformer.prune.inputs import sample_inputs
from dropformer.prune.outline import Outline
from dropformer.prune.plan import choose
from dropformer.prune.proof import prove

SETTLED = {"big_bird": "with attention_type original_full", "rwkv": "with rescale_every 0"}
QUICK = ["llama", "qwen3_moe", "gemma2", "phi", "gpt2", "opt", "bloom", "deepseek_v3", "minimax", "jamba", "bert"]
NEW_TOKENS = 4


class Partly(Exception):
    """Some kind of layer works, another is refused."""


class Wrong(Exception):
    """A pruned model that is not what it should be."""


def judge(family: str) -> Verdict:
    """Take one family through everything."""
    try:
        model = tiny_model(family)
    except Exception as error:  # whatever transformers raises for a config that it cannot build
        return Verdict(family, "unbuildable", _line(error))
    folder = Path(tempfile.mkdtemp(prefix="architectures-"))
    try:
        said = _through(model, folder)
        return Verdict(family, "works", f"{said}; {SETTLED[family]}, refused otherwise" if family in SETTLED else said)
    except DropformerError as error:
        return Verdict(family, "refused", _line(error))
    except Partly as error:
        return Verdict(family, "partly", _line(error))
    except Wrong as error:
        return Verdict(family, "wrong", _line(error))
    except Exception as error:  # a crash is wrong too
        return Verdict(family, "wrong", f"{type(error).__name__}: {_line(error)}")
    finally:
        shutil.rmtree(folder)


def _through(dense: nn.Module, folder: Path) -> str:
    dense.save_pretrained(folder / "dense")
    architecture = discover(dense)
    prove(dense, architecture)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    analyze_model(dense, [inputs(dense, ids)], architecture)
    opened = api.Opened(dropformer.load(folder / "dense"), None, folder / "dense", _reference(folder / "dense"), None)
    _same(_logits(opened.model, ids), _logits(dense, ids), "transformers' own reload of the dense model")
    outline = api.outline(opened.model)
    generates = _generates(dense, ids)
    tried: list[str] = []
    notes = ["" if generates else "no cached generation to compare"]
    for kind in ("attn", "mlp", "block"):
        layers = _some(architecture, kind, outline)
        if layers:
            spec = _spec(layers)
            plan = api.plan_unscored(opened.ref, outline, spec, (), None)
            pruned = api.drop(opened, plan)
            notes.append(pruned.dropformer.surgery.note)
            _check(opened.model, architecture, layers, pruned, ids, folder / kind, generates)
            tried.append(spec)
    blocks = [block for stack in architecture.stacks for block in stack.blocks]
    for kind in {kind for block in blocks for kind in block.kept} - {layer.kind for layer in architecture.layers()}:
        reason = next(block.kept[kind] for block in blocks if kind in block.kept)
        raise Partly(f"{', '.join(tried)} work; {kind} of every block stays: {reason}")
    kept = {reason for stack in architecture.stacks for block in stack.blocks for reason in block.kept.values()}
    notes += sorted(kept)[:1]
    return "; ".join([", ".join(tried), *filter(None, dict.fromkeys(notes))])


def _check(
    dense: nn.Module,
    architecture: Architecture,
    layers: list[Layer],
    pruned: nn.Module,
    ids: Any,
    out: Path,
    cached: bool,
) -> None:
    what = _spec(layers)
    with silenced(dense, architecture, layers):
        want = _logits(dense, ids)
    got = _logits(pruned, ids)
    _same(got, want, f"{what}: dropping against silencing")
    if torch.allclose(got, _logits(dense, ids), rtol=0, atol=1e-6):
        raise Wrong(f"{what}: dropping changes nothing")
    if cached:
        _same_generation(pruned, ids, what)
    api.save(pruned, out)
    again = dropformer.load(out)
    _same(_logits(again, ids), got, f"{what}: reload against memory")
    if cached and layers[0].kind == "attn":
        _same_generation(again, ids, f"{what}, reloaded")


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

    def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if isinstance(form, list):
            return tuple(replace(f, v, args, kwargs) for f, v in zip(form, output, strict=True))
        if isinstance(form, dict) and "list" in form:
            return [replace(f, v, args, kwargs) for f, v in zip(form["list"], output, strict=True)]
        if isinstance(form, dict):
            fields = form["fields"]
            return type(output)(**{k: replace(f, getattr(output, k), args, kwargs) for k, f in fields.items()})
        return replace(form, output, args, kwargs)

    return hook


def _some(architecture: Architecture, kind: str, outline: Outline) -> list[Layer]:
    """One or two layers of a kind, of the stack that has most of them."""
    stacks = [[layer for layer in stack.layers() if layer.kind == kind] for stack in architecture.stacks]
    found = max(stacks, key=len)
    pairs = [found[1:3], found[-2:]] if len(found) > 3 else []
    if kind == "block" and pairs:  # the last one too: nothing after it gets another number, yet the count changes
        pairs = [[found[1], found[-1]], [found[0], found[-1]], *pairs[::-1]]
    return next((pair for pair in pairs if _allowed(outline, pair)), found[-1:])


def _allowed(outline: Outline, layers: list[Layer]) -> bool:
    """Does the plan leave attention, and keys and values where the model has some?"""
    try:
        return bool(choose(outline, _spec(layers)))
    except PlanError:
        return False


def _spec(layers: list[Layer]) -> str:
    name = f"{layers[0].stack}.{layers[0].kind}" if layers[0].stack else layers[0].kind
    return f"{name}={','.join(str(layer.index) for layer in layers)}"


def inputs(model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """The forward arguments of a sample batch, with our own token ids in it where it takes some."""
    found = sample_inputs(model)
    rows = found["input_ids"].shape[0] // ids.shape[0]
    return {**found, "input_ids": ids.repeat(rows, 1)}


@torch.no_grad()
def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(**inputs(model, ids)).logits.float()


@torch.no_grad()
def _generation(model: nn.Module, ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
    made = model.generate(
        inputs(model, ids)["input_ids"],
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(made.logits).float()


def _generates(model: nn.Module, ids: torch.Tensor) -> bool:
    """Does the dense model generate with its cache what it generates without?"""
    try:
        return _close(_generation(model, ids, True), _generation(model, ids, False))
    except Exception:  # families that only generate from images, audio or a target model
        return False


def _same_generation(model: nn.Module, ids: torch.Tensor, what: str) -> None:
    _same(_generation(model, ids, True), _generation(model, ids, False), f"{what}: cached against uncached")


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(1.0))


def _same(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    if not _close(a, b):
        by = f"by {(a - b).abs().max():.2g}" if a.shape == b.shape else "in shape"
        raise Wrong(f"{what} differs {by}")


def _reference(folder: Path) -> Any:
    return api.reference(folder.name, folder)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:240]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; default: all")
    parser.add_argument("--quick", action="store_true", help="a representative two dozen")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    families = options.families or (QUICK if options.quick else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    verdicts = []
    for family in families:
        start = time.perf_counter()
        verdicts.append(judge(family))
        seconds = time.perf_counter() - start
        print(f"{family:26}{verdicts[-1].result:12}{seconds:5.1f} s  {verdicts[-1].said}", flush=True)
    if options.write:
        options.write.write_text(document(verdicts), encoding="utf-8")
    decoders = count([v for v in verdicts if decoder_only(v.family)])
    figures = {"decoder_only": decoders["families"], "decoder_only_works": decoders["works"]}
    print(json.dumps({"benchmark": "architectures", **count(verdicts), **figures}))


if __name__ == "__main__":
    main()
