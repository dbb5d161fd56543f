"""The engines that may load a checkpoint, by name: each is one file with its `answer`, and one entry in ENGINES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dropformer.prune.engines.facts import CheckpointFacts, read_facts
from dropformer.prune.registry import Registry, imported

_HERE = "dropformer.prune.engines"
TRANSFORMERS = "load it in transformers"
NO_WINDOWS = "does not give single layers the windows that config.json names"
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Answer:
    """Whether an engine loads a checkpoint.

    command: what to type where it does.  why: where it does not, the reason; else what to know, "" for nothing.
    instead: what to do where it does not.  saves: what of the drop is saved there.
    """

    loads: bool
    command: str = ""
    why: str = ""
    instead: str = ""
    saves: str = ""


@dataclass(frozen=True)
class Engine:
    """An engine.  title: its name for people; answer: a function of the facts, or "module:name" of one."""

    title: str
    answer: str | Callable[[CheckpointFacts], Answer]


ENGINES: Registry[Engine] = Registry(
    "engine",
    {
        "transformers": Engine("transformers", f"{_HERE}.transformers:answer"),
        "vllm": Engine("vLLM", f"{_HERE}.vllm:stock"),
        "vllm-plugin": Engine("vLLM with dropformer installed", f"{_HERE}.vllm:with_plugin"),
        "sglang": Engine("SGLang", f"{_HERE}.deci_engines:sglang"),
        "tensorrt-llm": Engine("TensorRT-LLM", f"{_HERE}.deci_engines:tensorrt_llm"),
        "llama.cpp": Engine("llama.cpp", f"{_HERE}.llamacpp:answer"),
        "onnxruntime": Engine("ONNX Runtime", f"{_HERE}.on_device:onnxruntime"),
        "executorch": Engine("ExecuTorch", f"{_HERE}.on_device:executorch"),
        "mlx": Engine("MLX", f"{_HERE}.on_device:mlx"),
    },
)


WINDOWED = {"transformers": None, "vllm": ("ministral", "smollm3"), "vllm-plugin": ("ministral", "smollm3")}
"""The engines that give windows to single layers of a plain model as its config says, and the families tried in them;
others give them to all layers, to none, or by block number."""
ALL_OR_NONE = {"vllm": ("qwen2", "qwen3"), "vllm-plugin": ("qwen2", "qwen3")}
"""Families of a plain model that an engine gives windows in every layer, and refuses where some have none."""


ENCODERS = ("transformers", "onnxruntime", "executorch")
"""The engines that run encoders and vision models, pruned ones too."""
POOLING = ("vllm", "vllm-plugin", "sglang", "llama.cpp")
"""The engines that run some encoders of text as they are."""


def _answer(name: str, engine: Engine, facts: CheckpointFacts) -> Answer:
    pools = name in POOLING and facts.format != "dropformer" and "image_size" not in facts.config
    if not facts.writes and name not in ENCODERS and not pools:
        return Answer(False, why="runs models that write text", instead=TRANSFORMERS)
    tried = WINDOWED.get(name, ())
    if facts.stock_windows and tried is not None and facts.family not in tried:
        everywhere = set(facts.config.get("layer_types") or ()) == {SLIDING}
        whole = facts.family in ALL_OR_NONE.get(name, ())
        if not (whole and everywhere):
            why = f"gives {facts.family} windows in every layer or in none" if whole else NO_WINDOWS
            return Answer(False, why=why, instead=TRANSFORMERS)
    return imported(engine.answer)(facts)


def engines(folder: Path) -> dict[str, Any]:
    """Which engines load a checkpoint, as JSON: the checkpoint, then an answer by engine.

    Reads config.json, dropformer.json and the header of a .gguf file, no weights.  Raises CheckpointError where the
    folder holds no checkpoint.
    """
    facts = read_facts(folder)
    answers = {name: _answer(name, engine, facts) for name, engine in ENGINES.items()}
    checkpoint = {"format": facts.format, "family": facts.family, "saves": facts.saves}
    return {
        "schema": 1,
        "artifact": "engines",
        "checkpoint": str(folder),
        **checkpoint,
        "engines": {name: {"title": ENGINES[name].title, **asdict(answer)} for name, answer in answers.items()},
    }
