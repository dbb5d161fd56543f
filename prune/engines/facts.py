"""What the files of a checkpoint say about it, without torch or transformers: all that the engines' answers need."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dropformer.prune.errors import CheckpointError, shown
from dropformer.prune.files.config_json import CONFIG, read_config
from dropformer.prune.files.strict_json import read_object
from dropformer.prune.loading.deci.families import DECI, FAMILIES, is_own_deci
from dropformer.prune.window import CONTEXT, KV_AT

ZEROS = "nothing: dropped layers are zeros"
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # in the names of classes that write text
RECORD, PRUNED, REMOTE = "dropformer.json", "dropformer", "dropformer_remote"


@dataclass(frozen=True)
class CheckpointFacts:
    """One checkpoint.

    format: "dropformer", "deci", "gguf", "onnx", "executorch", "dense" (dropped layers are zeros) or "stock" (a plain
    model, packed ones too); family: transformers' model type of the dense model, of a GGUF file llama.cpp's.
    stock_windows: a plain model some of whose attentions see a window, which few engines give by layer.
    skipped: the kinds that some block lacks ("attention", "mlp"); first: what the first block lacks.
    sinks: what windows see beside their last tokens: "", "first tokens" or "constants".
    saves: parameters and KV cache against the dense model, in words; "" where nothing says.
    """

    folder: Path
    format: str
    family: str
    architecture: str = ""
    file: str = ""
    skipped: frozenset[str] = frozenset()
    first: frozenset[str] = frozenset()
    windows: bool = False
    stock_windows: bool = False
    maps: bool = False
    agents: bool = False
    sinks: str = ""
    saves: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The folder, or the file in it, for a shell."""
        return shlex.quote(str(self.folder / self.file))

    @property
    def stock(self) -> bool:
        """Is it a plain model of its family, in safetensors?"""
        return self.format in ("stock", "dense")

    @property
    def writes(self) -> bool:
        """Does it write text?  An encoder or a vision model does not."""
        return not self.architecture or any(word in self.architecture for word in WRITERS)

    @property
    def fits_deci(self) -> bool:
        """Could `--format deci` carry it?  Not where the first block has no attention."""
        return self.family in FAMILIES and "attention" not in self.first and self.lacks_alone

    @property
    def lacks_alone(self) -> bool:
        """Does it lack layers and nothing more, so that zeros can take their place?"""
        return not (self.windows or self.maps or self.agents)


def read_facts(folder: Path) -> CheckpointFacts:
    """What a checkpoint is.  Raises CheckpointError for a folder that holds none, a few files read in all."""
    if folder.is_file() and folder.suffix == ".gguf":
        return _gguf(folder, {})
    if not folder.is_dir():
        raise CheckpointError(f"{shown(folder)} is no folder; give the folder of a checkpoint, or a .gguf file")
    record = read_object(folder / RECORD) if (folder / RECORD).exists() else {}
    found = next(iter(sorted(folder.glob("*.gguf"))), None)
    if found and not any(folder.glob("*.safetensors")):  # else llama.cpp's converter made it of them
        return _gguf(found, record)
    if (folder / "model.onnx").exists():
        family = read_config(folder)["model_type"] if (folder / CONFIG).exists() else "?"
        return CheckpointFacts(folder, "onnx", family, file="model.onnx", saves=_saves(record))
    try:
        if record.get("format") == "executorch":
            return _executorch(folder, record)
        return _hugging_face(folder, record)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise CheckpointError(f"{shown(folder)}: its files are not as dropformer writes them; get it again") from None


def _hugging_face(folder: Path, record: Mapping[str, Any]) -> CheckpointFacts:
    config = read_config(folder)
    kind, family = config["model_type"], config.get("base_model_type", config["model_type"])
    architecture = (config.get("architectures") or [""])[0]
    if kind in (PRUNED, REMOTE):
        forms = config.get("dropformer_modules") or {}
        words = {key for form in forms.values() if isinstance(form, dict) for key in form}
        layers = config.get("per_layer_config") or {}
        skips = {str(i): frozenset(layer.get("skip", ())) for i, layer in layers.items()}
        return CheckpointFacts(
            folder, PRUNED, family, architecture, "", frozenset().union(*skips.values()), skips.get("0", frozenset()),
            "window" in words, False, "linear" in words, "agents" in words, _sinks(forms), _saves(record), config,
        )  # fmt: skip
    if kind == DECI and is_own_deci(config):
        blocks = [
            {"attention": block["attention"]["no_op"], "mlp": block["ffn"]["no_op"]}
            for block in config["block_configs"]
        ]
        skipped = [frozenset(name for name, off in block.items() if off) for block in blocks]
        all_kinds, first = frozenset().union(*skipped), skipped[0]
        return CheckpointFacts(
            folder, "deci", family, architecture, "", all_kinds, first, saves=_saves(record), config=config
        )
    form = "dense" if record.get("format") == "dense" else "stock"
    windows = bool(record.get("stock_windows"))
    saves = ZEROS if form == "dense" else _saves(record)
    return CheckpointFacts(folder, form, family, architecture, stock_windows=windows, saves=saves, config=config)


def _sinks(forms: Mapping[str, Any]) -> str:
    """What windows see beside their last tokens: nothing, "first tokens", or "constants"."""
    windows = [form for form in forms.values() if isinstance(form, dict) and "window" in form]
    if any(form.get("fold") for form in windows):
        return "constants"
    return "first tokens" if any(form["window"][1] for form in windows) else ""


def _executorch(folder: Path, record: Mapping[str, Any]) -> CheckpointFacts:
    family, dropped = record["model"]["model_type"], record["dropped"]
    skipped = frozenset(kind for kind in ("attention", "mlp") if dropped.get(kind))
    return CheckpointFacts(folder, "executorch", family, file="params.json", skipped=skipped, saves=_saves(record))


def _gguf(file: Path, record: Mapping[str, Any]) -> CheckpointFacts:
    from dropformer.prune.formats.gguf.header import read_gguf_header

    family = str(read_gguf_header(file).metadata.get("general.architecture", "?"))
    saves = ZEROS if record.get("format") == "gguf-dense" else _saves(record)
    return CheckpointFacts(file.parent, "gguf", family, file=file.name, saves=saves)


def _saves(record: Mapping[str, Any]) -> str:
    """Parameters and KV cache of dropformer.json before and after, in words."""
    before, after = record.get("before"), record.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return ""
    cache = ("KV cache", "kv_bytes_per_token")
    if before.get(KV_AT):  # with windows, a token's share is constant only beyond them all
        cache = (f"KV cache at {CONTEXT:,} tokens", KV_AT)
    names = (("parameters", "parameters"), cache)
    changes = [
        f"{word} {after[key] / before[key] - 1:+.1%}"
        for word, key in names
        if before.get(key) and isinstance(after.get(key), (int, float))
    ]
    return ", ".join(changes)
