"""The `onnx` format: one graph with its KV cache, by transformers' own exporter, run in ONNX Runtime before it is kept.

The graph takes input_ids and position_ids [B, T] and keys and values [B, heads, past, D] of every layer that has
them, and gives logits [B, T, V] and the longer cache; with an empty cache (past = 0) it is the prefill.  Dropped
attention layers have no such inputs.  It has no attention mask: a batch must not be padded.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from dropformer.prune.errors import OutputError, VerificationError, reason
from dropformer.prune.files import CopyReport
from dropformer.prune.formats.registry import ExportFacts
from dropformer.prune.formats.writing import ExportJob
from dropformer.prune.loading.quiet import quiet_logger, quiet_streams, quiet_transformers

NEEDS = ("onnx", "onnxscript", "onnxruntime")
FILE = "model.onnx"
TOLERANCE = 1e-3  # of the largest logit: ONNX Runtime adds up in another order


def check_installed(facts: ExportFacts | None = None) -> None:
    """Raises OutputError where the packages that this format needs are missing."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise OutputError(f"--format onnx needs {', '.join(missing)}; pip install 'dropformer[onnx]'")


def write_onnx(writing: ExportJob, folder: Path) -> CopyReport:
    """Export the pruned model in memory, in the type that it computes in, and compare ONNX Runtime's logits with its.

    Raises OutputError where transformers cannot export the model, VerificationError where the logits differ.
    """
    check_installed()
    model = writing.model
    if model is None or not hasattr(model, "generate") or model.config.is_encoder_decoder:
        raise OutputError("--format onnx takes a decoder that generates text; use --format dropformer")
    try:
        with quiet_logger("torch.onnx"), quiet_transformers(), quiet_streams():
            _export(model, folder)
    except Exception as error:  # whatever the exporter's many stages raise
        said = f"{type(error).__name__}: {reason(error)}"
        raise OutputError(f"transformers cannot export this model to ONNX: {said}") from error
    try:
        compare(model, folder / FILE)
    except (KeyError, RuntimeError, ValueError) as error:
        raise VerificationError(
            f"ONNX Runtime cannot run the graph with its cache: {reason(error)}; nothing was kept"
        ) from error
    size = sum(path.stat().st_size for path in folder.glob(f"{FILE}*"))
    return CopyReport(len(writing.names), 0, size, writing.source.nbytes - size)


def _export(model: Any, folder: Path) -> None:
    import torch
    from transformers.exporters.base import ExportedComponent, ExportedModel
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    ids = torch.randint(0, model.config.get_text_config().vocab_size, (2, 6), device=model.device)
    parts = decompose_for_generation(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, multi_token_decode=True
    )
    exporter = OnnxExporter()
    part: Any
    part, inputs = parts["decode"]
    program, metadata = exporter.export_program(part, inputs, config=OnnxConfig(dynamic=True))
    made = {"model": ExportedComponent(program, metadata)}
    ExportedModel(made, exporter.export_format, model.config, model.generation_config).save_pretrained(folder)


def compare(model: Any, path: Path) -> float:
    """The largest difference of logits between ONNX Runtime and the model: a prefill, then the rest with its cache.

    Raises VerificationError where it exceeds what another order of additions explains.
    """
    import torch

    ids = torch.arange(3, 15, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=True)
    start = {
        f"past_key_values.layers.{i}.{name}": (value[:, :, :0] if name in ("keys", "values") else value).cpu().numpy()
        for i, layer in enumerate(want.past_key_values.layers)
        for name, value in vars(layer).items()
        if isinstance(value, torch.Tensor)  # a sliding window has its length as one too
    }
    want = want.logits.float().cpu()
    got = torch.cat(run_in_parts(path, ids.cpu().numpy(), start, (0, 7, 8, ids.shape[1])), 1)
    difference = float((got - want).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(want.abs().max())):
        raise VerificationError(
            f"the ONNX graph gives other logits than the model (largest difference {difference:.3g}); nothing was kept"
        )
    return difference


def run_in_parts(path: Path, ids: Any, start: dict[str, Any], cuts: tuple[int, ...]) -> list[Any]:
    """Logits of ids [B, T] by ONNX Runtime, fed from cut to cut, each part with the cache of those before."""
    import numpy as np
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = [node.name for node in session.get_outputs()]
    kinds = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}
    types = {node.name: kinds[node.type] for node in session.get_inputs()}
    cache = {f"input.{name}": value for name, value in start.items() if f"input.{name}" in types}
    found = []
    for first, end in pairwise(cuts):
        positions = np.broadcast_to(np.arange(first, end), (len(ids), end - first))
        given = {"input_ids": ids[:, first:end], "position_ids": positions, **cache}
        values = session.run(None, {name: given[name].astype(kind) for name, kind in types.items()})
        named = dict(zip(outputs, values, strict=True))
        found.append(torch.from_numpy(named["logits"]).float())
        cache = {name: named.get(name.replace("input.", "output.", 1), old) for name, old in cache.items()}
    return found
