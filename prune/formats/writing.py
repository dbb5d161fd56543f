"""Write the files of a pruned checkpoint from those of the dense one: headers, names, byte ranges; no model.

An `ExportJob` says what is to be written; each format (`prune.formats`) is a function of it and a folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dropformer.progress import Tick
from dropformer.prune.block_map import BlockMap, Surgery, new_name, skipped_modules
from dropformer.prune.errors import CheckpointError
from dropformer.prune.files import Checkpoint, CopyReport, NewTensor, copy_checkpoint
from dropformer.prune.formats.names import numbered_heads, renaming
from dropformer.prune.outline import Outline
from dropformer.prune.surgery.config import pruned_config, without_heads
from dropformer.prune.surgery.patterns import settled_patterns
from dropformer.prune.surgery.stock_windows import stock_windows

MODEL_TYPE, REMOTE_TYPE = "dropformer", "dropformer_remote"
LOADING = Path(__file__).parents[1] / "loading"
CODE_FILE = "modeling_dropformer.py"
COMPANIONS = ("own_code.py", "skipped_modules.py", "window_attention.py", "window_cache.py", "agent_attention.py")
CODE = {CODE_FILE: "modeling.py", **{name: name for name in COMPANIONS}}
MLX_FILE = "mlx_dropformer.py"  # the model file that mlx-lm runs


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is written.

    `format` is one of `formats.FORMATS`; `link`: shards in which nothing changes become hard links; `thorough`:
    every byte is compared with the source, not a sample; `gguf`: the file from which the source was converted;
    `trust_remote_code`: code that comes with the source may say what it builds.
    """

    format: str = "dropformer"
    link: bool = False
    thorough: bool = False
    gguf: Path | None = None
    progress: Tick | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class ExportJob:
    """What is to be written.

    `config` is the dense config.json, with what transformers derives by position written out where blocks move;
    `names` maps the source's tensors to parameters of the dense model, whose trunk is at `prefix`; `autos` are the
    Auto classes that load it; `model` is the pruned model in memory, for formats that need it.  `parts`: repaired
    parameters, by the pruned model's names, that the files hold in several tensors -> those by name.
    """

    source: Checkpoint
    config: dict[str, Any]
    surgery: Surgery
    names: Mapping[str, str]
    prefix: str
    autos: Sequence[str]
    how: ExportOptions = field(default_factory=ExportOptions)
    model: Any = None
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def outline(self) -> Outline:
        return self.surgery.outline

    @property
    def block_map(self) -> BlockMap:
        return self.surgery.block_map

    @cached_property
    def rename(self) -> Callable[[str], str | None]:
        """The name of each tensor of the source in the pruned checkpoint; None for removed ones."""
        return renaming(self.outline, self.block_map, self.names, self.prefix)

    @cached_property
    def repaired(self) -> dict[str, NewTensor]:
        """Parameters of the pruned model, by its names, that are not the dense model's; without those of `parts`."""
        return _stored({name: tensor for name, tensor in self.surgery.tensors.items() if name not in self.parts})

    @cached_property
    def repaired_parts(self) -> dict[str, NewTensor]:
        """New values of the source's tensors from which transformers merges a repaired parameter."""
        return _stored({name: tensor for parts in self.parts.values() for name, tensor in parts.items()})

    def copy(self, folder: Path, rename: Callable[[str], str | None], replace: Mapping[str, NewTensor]) -> CopyReport:
        """Copy the source's tensors under new names; raises as `copy_checkpoint`."""
        return copy_checkpoint(
            self.source,
            folder,
            rename,
            replace=replace,
            link=self.how.link,
            verify="all" if self.how.thorough else "sample",
            progress=self.how.progress,
        )

    def parameters(self, tensor: str) -> tuple[str, str]:
        """What the parameter that a tensor is may be called: as in a bare trunk, and as in a model with a head."""
        name = self.names[tensor]
        return name, f"{self.prefix}.{name}"


@dataclass(frozen=True)
class Exported:
    """A finished checkpoint: where it is, what was copied, its record, how far its logits are from the model's.

    `record` is dropformer.json; `max_difference` is None where nothing here can run the format, or no memory was
    left to run it; its bytes were compared all the same.
    """

    path: Path
    copied: CopyReport
    record: dict[str, Any]
    max_difference: float | None

    @property
    def packed(self) -> bool:
        return self.record["packed"]


def _stored(tensors: Mapping[str, Any]) -> dict[str, NewTensor]:
    if not tensors:
        return {}
    from dropformer.prune.surgery.stored_tensors import new_tensor  # imports torch: only where there is a tensor

    return {name: new_tensor(tensor) for name, tensor in tensors.items()}


def write_pruned(writing: ExportJob, folder: Path) -> CopyReport:
    """The default format: a stock model where the plan packs, or has windows that a stock class obeys, else one of
    model_type `dropformer` with the code that loads it."""
    heads = numbered_heads(writing.outline, writing.block_map, writing.names, writing.prefix)
    config = without_heads(writing.config, writing.outline, heads)
    fields = pruned_config(config, writing.outline, writing.block_map)
    if writing.block_map.rungs:
        plain = pruned_config(config, writing.outline, replace(writing.block_map, rungs={}))
        fields = stock_windows(plain, writing.outline, writing.block_map) or fields
    notes: list[str] = []
    if not writing.block_map.in_place(writing.outline):
        fields, notes = settled_patterns(fields)
    write_config(folder, fields, writing.autos)
    copied = writing.copy(folder, writing.rename, replacements(writing, writing.rename))
    return replace(copied, notes=(*copied.notes, *notes))


def write_config(folder: Path, fields: dict[str, Any], autos: Sequence[str]) -> None:
    """config.json; one that no stock loader knows comes with the code that loads it under `trust_remote_code`."""
    if fields["model_type"] in (MODEL_TYPE, REMOTE_TYPE):
        stem, remote = Path(CODE_FILE).stem, fields["model_type"] == REMOTE_TYPE
        config = "DropformerRemoteConfig" if remote else "DropformerConfig"
        classes = {"AutoConfig": f"{stem}.{config}"} | {auto: f"{stem}.Pruned{auto}" for auto in autos}
        fields = {**fields, "auto_map": classes}
        for name, source in CODE.items():
            shutil.copyfile(LOADING / source, folder / name)
        if "AutoModelForCausalLM" in autos and not remote:
            fields["model_file"] = MLX_FILE
            shutil.copyfile(LOADING.with_name("engines") / MLX_FILE, folder / MLX_FILE)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def replacements(writing: ExportJob, rename: Callable[[str], str | None]) -> dict[str, NewTensor]:
    """What is to be written in place of the source's tensors, by the name that `rename` gives the new one.

    Raises CheckpointError where the files hold a repaired parameter in no tensor.
    """
    left, found = dict(writing.repaired), dict[str, NewTensor]()
    bare = True  # the files leave out the prefix that the model with its head puts before the trunk's names
    for tensor in writing.names:
        new_file = rename(tensor)
        if new_file is None:
            continue
        if tensor in writing.repaired_parts:
            found[new_file] = writing.repaired_parts[tensor]
        for candidate in writing.parameters(tensor):
            new = new_name(writing.outline, writing.block_map, candidate)
            bare = bare and not tensor.startswith(f"{writing.prefix}.")
            if new in left:
                found[new_file] = left.pop(new)
    maps = mapped_modules(writing)
    for parameter, value in left.items():
        if parameter.rpartition(".")[0] not in maps:
            raise CheckpointError(f"{parameter} was repaired, but the files do not hold it; leave out --repair")
        found[parameter.removeprefix(f"{writing.prefix}.") if bare else parameter] = value
    return found


def mapped_modules(writing: ExportJob) -> set[str]:
    """Paths, in the pruned model, of the modules with parameters that no file of the source has."""
    forms = skipped_modules(writing.outline, writing.block_map)
    return {path for path, form in forms.items() if isinstance(form, dict) and form.keys() & {"linear", "fold"}}
