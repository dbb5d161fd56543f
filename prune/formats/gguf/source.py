"""What every pruned form needs to know of a dense GGUF file: its architecture, its depth, its tensors by block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dropformer.prune.errors import CheckpointError, shown
from dropformer.prune.formats.gguf.header import GgufHeader, GgufTensor

ARCHITECTURES = (
    *("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "gpt2", "falcon", "bloom"),
    *("stablelm", "starcoder2", "nemotron", "gpt-oss", "minimax-m2"),
)
"""Those that transformers reads, so that a model can be planned from them, with one stack of like blocks."""

COUNTED = ("leading_dense_block_count", "nextn_predict_layers", "attention.shared_kv_layers")
"""Keys that count blocks from one end."""


@dataclass(frozen=True)
class GgufSource:
    """A dense file; name: the file's, for messages."""

    header: GgufHeader
    name: str
    architecture: str
    blocks: int

    def key(self, rest: str) -> Any:
        """The value of one of the architecture's keys, None where there is none."""
        return self.header.metadata.get(f"{self.architecture}.{rest}")

    @property
    def experts(self) -> bool:
        return bool(self.key("expert_count"))

    @cached_property
    def leaves(self) -> list[dict[str, GgufTensor]]:
        """The tensors of each block by what follows `blk.N.`, in the file's order.

        Raises CheckpointError for tensors of a block beyond the last.
        """
        found: list[dict[str, GgufTensor]] = [{} for _ in range(self.blocks)]
        for name, tensor in self.header.tensors.items():
            if name.startswith("blk."):
                number, _, leaf = name.removeprefix("blk.").partition(".")
                if not number.isdecimal() or int(number) >= self.blocks:
                    raise CheckpointError(f"{self.name} holds {shown(name)}, beyond its {self.blocks} blocks")
                found[int(number)][leaf] = tensor
        return found


def read_source(header: GgufHeader, name: str) -> GgufSource:
    """The dense model of a GGUF file.  Raises CheckpointError for one that has no pruned form."""
    architecture = header.text("general.architecture") or "(none named)"
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{name} has the architecture {shown(architecture)}; a GGUF is written from {', '.join(ARCHITECTURES)}; "
            "choose another format"
        )
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{name} is one of several files of a model; join them with llama-gguf-split --merge first"
        )
    blocks = header.metadata.get(f"{architecture}.block_count")
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks <= 0:
        raise CheckpointError(f"{name}: its key {architecture}.block_count is {shown(blocks)}, not a positive number")
    if blocks > len(header.tensors):
        raise CheckpointError(f"{name} has fewer tensors than its {blocks} blocks; get it again")
    source = GgufSource(header, name, architecture, blocks)
    if counted := [key for key in COUNTED if source.key(key)]:
        raise CheckpointError(f"{name}: its key {architecture}.{counted[0]} counts blocks; choose another format")
    return source
