"""The formats that a pruned model can be written in, by name: what writes them, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dropformer.prune.block_map import BlockMap
from dropformer.prune.errors import OutputError, PlanError
from dropformer.prune.files import CopyReport
from dropformer.prune.formats.dense import write_dense
from dropformer.prune.formats.onnx import write_onnx
from dropformer.prune.formats.writing import ExportJob, write_pruned

Write = Callable[[ExportJob, Path], CopyReport]

PACKED = "The layers that remain pair up, so this is a stock, shorter model: it loads wherever the base model does."


@dataclass(frozen=True)
class Format:
    """`write` fills a folder; `brief` and `loads` say how the result is loaded, in a few words and for a model card.
    `checked`: what is known of the files where dropformer does not load them.

    `reloads`: dropformer loads it, so that its logits can be compared with the model in memory; `packs`: a plan
    that packs gives a stock model; `saves`: what is dropped is gone; `sides`:
    the tokenizer and other files go along; `runs`: the model itself is needed, not its files; `windows`: it holds
    attention layers that see a window.
    """

    write: Write
    brief: str
    loads: str
    reloads: bool = False
    packs: bool = False
    saves: bool = True
    sides: bool = True
    runs: bool = False
    windows: bool = False
    checked: str = "every tensor's bytes are the source's"

    def check(self, name: str, block_map: BlockMap) -> None:
        """Raises PlanError for a plan that the format, of this name, cannot hold."""
        if block_map.windows and not self.windows:
            able = ", ".join(other for other, kind in FORMATS.items() if kind.windows)
            raise PlanError(f"--format {name} holds no attention windows, which this plan has; give --format {able}")

    def loading(self, packed: bool) -> str:
        return PACKED if packed and self.packs else self.loads

    def summary(self, packed: bool) -> str:
        return "a stock, shorter model: loads anywhere" if packed and self.packs else self.brief


def write_deci(writing: ExportJob, folder: Path) -> CopyReport:
    """A DeciLM checkpoint, or a stock one where the plan packs.  Raises as `deci.deci_config`."""
    if writing.block_map.packed:
        return write_pruned(writing, folder)
    from dropformer.prune.formats import deci  # imports torch

    return deci.write(writing, folder)


def write_gguf(writing: ExportJob, folder: Path) -> CopyReport:
    """A GGUF file made from the dense one.  Raises OutputError where the model did not come as a .gguf file."""
    if writing.how.gguf is None:
        raise OutputError(
            "--format gguf cuts a .gguf file, and this model is none; give the .gguf of the dense model as --model "
            "(llama.cpp's convert_hf_to_gguf.py makes it)"
        )
    from dropformer.prune.formats.gguf import write

    done = write.write_gguf(
        writing.how.gguf,
        folder / f"{writing.how.gguf.stem}-pruned.gguf",
        writing.surgery,
        progress=writing.how.progress,
        verify="all" if writing.how.thorough else "sample",
    )
    return replace(done.copied, notes=done.stand_ins)


FORMATS = {
    "dropformer": Format(
        write_pruned,
        "import dropformer, or trust_remote_code=True, to load it",
        "Load it with `import dropformer` before `AutoModelForCausalLM.from_pretrained(...)`, or with "
        "`trust_remote_code=True`, which runs the small `modeling_dropformer.py` in this folder.",
        reloads=True,
        packs=True,
        windows=True,
    ),
    "dense": Format(
        write_dense,
        "dropped layers are zeros: loads anywhere, saves nothing",
        "Dropped layers are zeros, so it loads wherever the base model does, gives the pruned model's outputs, and "
        "saves neither bytes nor time.",
        reloads=True,
        saves=False,
    ),
    "deci": Format(
        write_deci,
        "for vLLM, SGLang and TensorRT-LLM",
        "A DeciLMForCausalLM: `vllm serve` runs it where dropformer is installed, else with `--trust-remote-code`, "
        "which reads the small `configuration_decilm.py` in this folder.",
        reloads=True,
        packs=True,
    ),
    "gguf": Format(
        write_gguf,
        "for llama.cpp, with flash attention on",
        "The .gguf file runs in llama.cpp; turn flash attention on (`-fa on`).",
        sides=False,
    ),
    "onnx": Format(
        write_onnx,
        "for ONNX Runtime",
        "`model.onnx` runs in ONNX Runtime: input_ids, position_ids and the KV cache in, logits and the longer cache "
        "out; with an empty cache it is the prefill. Batches must not be padded.",
        runs=True,
        checked="ONNX Runtime gives the model's logits",
    ),
}


def known_format(name: str) -> Format:
    """Raises OutputError for a name that is no format's."""
    if name not in FORMATS:
        raise OutputError(f"format `{name}` is unknown; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]
