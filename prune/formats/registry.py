"""The formats that a pruned model can be written in, by name: what writes them, and how they are loaded.

A new one is one file with its `write`, and one entry in FORMATS.  Light: what writes is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropformer.prune.architecture import Layer
from dropformer.prune.errors import OutputError, PlanError
from dropformer.prune.loading.deci.families import check_family
from dropformer.prune.registry import Registry, imported

if TYPE_CHECKING:
    from dropformer.prune.block_map import BlockMap
    from dropformer.prune.files import CopyReport
    from dropformer.prune.formats.writing import ExportJob

    Write = Callable[[ExportJob, Path], CopyReport]
    Check = Callable[["ExportFacts"], None]

_HERE = "dropformer.prune.formats"
UNEVEN = ("hybrid_override_pattern", "layers_block_type")  # config keys of models whose blocks hold one branch each
PACKED = "The layers that remain pair up, so this is a stock, shorter model: it loads wherever the base model does."
LIMITED = (
    "The layers that remain pair up, so this is a stock, shorter model: transformers loads it as it loads the base "
    "model, and so does every engine that the notes do not except."
)
WINDOWED = (
    "This is a stock model whose class obeys `layer_types` and `sliding_window`: it loads wherever that class does, as "
    "`AutoModelForCausalLM.from_pretrained(...)` does, without code beside it."
)


@dataclass(frozen=True)
class ExportFacts:
    """What is known of an export before the model is opened.

    `gguf`: the model comes as a .gguf file; `config`: its config.json, None where it must be fetched first;
    `may_pack`: the blocks that remain may form a stock, shorter model; `layers`: those to drop, None until scores
    tell; `repairs`: others get new weights.
    """

    model: str
    gguf: bool = False
    config: Mapping[str, Any] | None = None
    may_pack: bool = False
    layers: Collection[Layer] | None = None
    repairs: bool = False


@dataclass(frozen=True)
class Format:
    """One export format.

    `write` fills a folder and `check` raises what can be told before the model is opened; each is a function or
    "module:name" of one.  `brief` and `loads` say how the result is loaded, in a few words and for a model card;
    `help` is its remark in `--help`.  `checked`: how the files are verified where dropformer does not load them.

    `reloads`: dropformer loads it, so its logits are compared with the model in memory; `packs`: a plan that packs
    gives a stock model; `saves`: dropped layers take no bytes; `sides`: the tokenizer and other files are copied too;
    `runs`: it needs the model in memory, not its files; `links`: unchanged shards can be hard links; `copies`: bytes
    come from the source; `maps`, `rungs`: it can hold linear maps, windows and agents.  `settings`: files of
    its own that count or name the pruned model's blocks.
    """

    write: str | Write
    brief: str
    loads: str
    help: str = ""
    check: str | Check = lambda facts: None
    reloads: bool = False
    packs: bool = False
    saves: bool = True
    sides: bool = True
    runs: bool = False
    links: bool = True
    copies: bool = True
    maps: bool = True
    rungs: bool = False
    settings: tuple[str, ...] = ()
    checked: str = "every tensor's bytes are the source's"

    def fill(self, folder: Path, job: ExportJob) -> CopyReport:
        """Write a checkpoint's files but for its record: the model's, those beside it, settings that number blocks."""
        from dropformer.prune.files.side_files import copy_side_files
        from dropformer.prune.surgery.side_files import follow_files

        copied = imported(self.write)(job, folder)
        if self.sides:
            copied = copied.noted(copy_side_files(job.source.folder, folder).note)
        if self.saves:
            follow_files(folder, job.outline, job.block_map, self.settings)
        return copied

    def checker(self) -> Check:
        return imported(self.check)

    def check_rungs(self, name: str, block_map: BlockMap) -> None:
        """Raises PlanError for a plan with windows or agents that the format, of this name, cannot hold."""
        if block_map.rungs and not self.rungs:
            raise self.without_rungs(name, bool(block_map.windows))

    def without_rungs(self, name: str, windows: bool) -> PlanError:
        able = ", ".join(other for other, kind in FORMATS.items() if kind.rungs)
        what = "attention windows" if windows else "agents"
        return PlanError(f"--format {name} holds no {what}, which this plan has; give --format {able}")

    def loading(self, packed: bool, limited: bool = False, windowed: bool = False) -> str:
        """How a checkpoint is loaded; `limited`: notes of its record name engines that would read it wrongly.

        `windowed`: a stock model with windows of attention.
        """
        if windowed:
            return WINDOWED
        stock = LIMITED if limited else PACKED
        return stock if packed and self.packs else self.loads

    def summary(self, packed: bool, limited: bool = False, windowed: bool = False) -> str:
        if windowed:
            return "a stock model with sliding windows: loads wherever its class does"
        stock = "loads in transformers; not in every engine" if limited else "loads anywhere"
        return f"a stock, shorter model: {stock}" if packed and self.packs else self.brief


def _check_deci(facts: ExportFacts) -> None:
    """Raises ArchitectureError for a family that DeciLM cannot carry, unless what remains may pack."""
    if facts.config and not facts.may_pack and not any(key in facts.config for key in UNEVEN):
        check_family(facts.config)


FORMATS: Registry[Format] = Registry(
    "--format",
    {
        "dropformer": Format(
            f"{_HERE}.writing:write_pruned",
            "import dropformer, or trust_remote_code=True, to load it",
            "Load it with `import dropformer` before `AutoModelForCausalLM.from_pretrained(...)`, or with "
            "`trust_remote_code=True`, which runs the small `modeling_dropformer.py` in this folder.",
            reloads=True,
            packs=True,
            rungs=True,
        ),
        "dense": Format(
            f"{_HERE}.dense:write_dense",
            "dropped layers are zeros: loads anywhere, saves nothing",
            "Dropped layers are zeros, so it loads wherever the base model does, gives the pruned model's outputs, and "
            "saves neither bytes nor time.",
            help="zeros, loads anywhere",
            reloads=True,
            saves=False,
            maps=False,
        ),
        "deci": Format(
            f"{_HERE}.deci:write",
            "for vLLM, SGLang and TensorRT-LLM",
            "A DeciLMForCausalLM: `vllm serve` runs it where dropformer is installed, else with `--trust-remote-code`, "
            "which reads the small `configuration_decilm.py` in this folder.",
            help="vLLM",
            check=_check_deci,
            reloads=True,
            packs=True,
            maps=False,
        ),
        "gguf": Format(
            f"{_HERE}.gguf.export:write",
            "for llama.cpp, with flash attention on",
            "The .gguf file runs in llama.cpp; turn flash attention on (`-fa on`).",
            help="llama.cpp, from a .gguf",
            check=f"{_HERE}.gguf.export:check",
            sides=False,
            links=False,
        ),
        "gguf-dense": Format(
            f"{_HERE}.gguf.export:write_zeros",
            "dropped layers are zeros: llama.cpp loads it as the dense file, saves nothing",
            "Dropped layers are zeros, so the .gguf file runs wherever the dense one does, gives the pruned model's "
            "outputs, and saves neither bytes nor time.",
            help="the same as --format gguf --dense",
            check=f"{_HERE}.gguf.export:check_zeros",
            saves=False,
            sides=False,
            links=False,
            maps=False,
        ),
        "onnx": Format(
            f"{_HERE}.onnx:write_onnx",
            "for ONNX Runtime",
            "`model.onnx` runs in ONNX Runtime: input_ids, position_ids and the KV cache in, logits and the longer "
            "cache out; with an empty cache it is the prefill. Batches must not be padded.",
            help="ONNX Runtime",
            check=f"{_HERE}.onnx:check_installed",
            runs=True,
            links=False,
            copies=False,
            checked="ONNX Runtime gives the model's logits",
        ),
        "executorch": Format(
            f"{_HERE}.executorch:write",
            "params.json and model.pth, for ExecuTorch's exporter",
            "ExecuTorch's exporter makes a .pte of it: `python -m executorch.extension.llm.export.export_llm "
            "base.params=params.json base.checkpoint=model.pth model.use_kv_cache=True backend.xnnpack.enabled=True`.",
            help="ExecuTorch",
            check=f"{_HERE}.executorch:check",
            runs=True,
            links=False,
            copies=False,
            maps=False,
            settings=("params.json",),
            checked="every tensor is the model's",
        ),
    },
    OutputError,
)
