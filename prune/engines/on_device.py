"""ONNX Runtime, ExecuTorch and MLX."""

from __future__ import annotations

from shlex import quote

from dropformer.prune.engines.facts import CheckpointFacts
from dropformer.prune.engines.registry import TRANSFORMERS, Answer
from dropformer.prune.formats.executorch import FAMILIES as EXECUTORCH_FAMILIES
from dropformer.prune.surgery.patterns import counted_wrongly

EXPORTER = "executorch.extension.llm.export.export_llm"
CACHED = "model.use_kv_cache=True backend.xnnpack.enabled=True"
MLX_TRIED = ("llama", "qwen3", "gemma3_text")


def onnxruntime(facts: CheckpointFacts) -> Answer:
    """ONNX Runtime 1.32, by transformers' exporter."""
    if facts.format == "onnx":
        file = str(facts.folder / facts.file)
        return Answer(True, f"import onnxruntime; onnxruntime.InferenceSession({file!r})", saves=facts.saves)
    if facts.windows or facts.agents:
        why = f"the ONNX export holds no {'attention windows' if facts.windows else 'agents'}"
        return Answer(False, why=why, instead=TRANSFORMERS)
    return Answer(False, why="reads ONNX graphs alone", instead="export with --format onnx")


def executorch(facts: CheckpointFacts) -> Answer:
    """ExecuTorch 1.5.1: the Llama model of its exporter, which reads params.json."""
    if facts.format == "executorch":
        params, weights = (quote(str(facts.folder / name)) for name in ("params.json", "model.pth"))
        command = f"python -m {EXPORTER} base.params={params} base.checkpoint={weights} {CACHED}"
        note = "a dropped MLP is zeros there and saves nothing" if "mlp" in facts.skipped else ""
        return Answer(True, command, note, "", facts.saves)
    if facts.windows or facts.maps:
        why = f"its Llama model has no {'attention window' if facts.windows else 'linear map'} by layer"
        return Answer(False, why=why, instead=TRANSFORMERS)
    if facts.family in EXECUTORCH_FAMILIES:
        return Answer(False, why="its exporter reads params.json", instead="export with --format executorch")
    if facts.stock:
        return Answer(True, f"optimum-cli export executorch --model {facts.path}", "not tried", "", facts.saves)
    return Answer(
        False, why=f"its Llama model does not compute {facts.family}", instead="export with --format dense, not tried"
    )


def mlx(facts: CheckpointFacts) -> Answer:
    """mlx-lm 0.32, which builds its class of the base family by the folder's own `mlx_dropformer.py`."""
    command = f"mlx_lm.generate --model {facts.path} --prompt 'Once upon a time'"
    if facts.stock:
        return Answer(True, command, "where it has the base model", "", facts.saves)
    if facts.format != "dropformer" or "model_file" not in facts.config:
        return Answer(False, why=f"loads no {facts.format} checkpoint", instead="export with --format dropformer")
    if facts.windows:
        return Answer(False, why="its attention has no window by layer", instead=TRANSFORMERS)
    every = facts.config.get("sliding_window_pattern", facts.config.get("_sliding_window_pattern"))
    if isinstance(every, int) and counted_wrongly(dict(facts.config), every):
        why = "it tells windows by block number, and after the dropped blocks no number does"
        return Answer(False, why=why, instead="drop attention and MLP layers alone")
    note = "tried" if facts.family in MLX_TRIED else "not tried: it loads where mlx-lm has the family"
    return Answer(True, f"{command} --trust-remote-code", note, "", facts.saves)
