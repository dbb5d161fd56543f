"""Run a model block by block over fixed batches: all of them pass a block before the next one is entered.

The model's own blocks are called with recorded arguments, and its own forward runs what comes before and after
them, so this works for any family.  A pass may start at any block from a kept stream; several changed models share
each loaded block; a block's weights come from memory, accelerate's offloading or files (`provider`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dropformer.metrics.analysis.analyze import as_inputs
from dropformer.metrics.blockwise.provider import Provider, provider_for
from dropformer.metrics.blockwise.work import Work
from dropformer.metrics.offload.keeper import Keeper
from dropformer.prune.architecture import Architecture, Stack, Tap
from dropformer.prune.discovery.trace import outputs_of
from dropformer.prune.errors import ArchitectureError, ModelError
from dropformer.prune.loading.device import hooks_of
from dropformer.prune.loading.parts import replaced
from dropformer.prune.loading.skipped_modules import stand_in

SIMILARITY = "use --metric similarity with --select one-shot and no --repair"


@dataclass(frozen=True)
class Call:
    """The arguments of one block on one batch, the stream among them at the key of the block's input tap."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def stream(self, key: int | str | None) -> Tensor:
        return self.args[key] if isinstance(key, int) else self.kwargs[str(key)]

    def on(self, key: int | str | None, stream: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another stream."""
        if isinstance(key, int):
            return (*self.args[:key], stream, *self.args[key + 1 :]), self.kwargs
        return self.args, {**self.kwargs, str(key): stream}


class BlockRunner:
    """A model split into embedding, blocks and head, on fixed batches.

    `batches` are forward arguments with the batch first.  `work` counts what is run, `keeper` holds streams; all
    runners of a job share them.  Construction embeds each batch and runs no block.  Memory: [B, T, D] per batch.
    Raises ArchitectureError for a model of several stacks.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        batches: Sequence[Mapping[str, Tensor]],
        provider: Provider | None = None,
        work: Work | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.model, self.stack = model, only_stack(architecture)
        self.blocks = self.stack.blocks
        self.batches = [as_inputs(model, batch) for batch in batches]
        self.provider = provider or provider_for(model)
        self.keeper = keeper or Keeper()
        self.counted: Sequence[Tensor | None] = [None] * len(self.batches)
        """Tokens of each batch that a fit counts, [B, T] bool (None: all)."""
        self.work = work or Work(len(self.blocks), self.tokens)
        self.work.measure(model, [block.path for block in self.blocks])
        self._passing = {block.path: stand_in(model.get_submodule(block.path), block.form) for block in self.blocks}
        with torch.no_grad():
            self._calls = [self._record(batch) for batch in self.batches]
        if any(len(calls) != len(self.blocks) for calls in self._calls):
            how = "more often than once" if max(map(len, self._calls)) > len(self.blocks) else "only with images"
            raise ArchitectureError(f"{self.stack.path} runs some of its blocks {how}; {SIMILARITY}")

    def like(self, batches: Sequence[Mapping[str, Tensor]], architecture: Architecture) -> BlockRunner:
        """A runner of the same model on other batches, with the same provider, work and keeper."""
        return BlockRunner(self.model, architecture, batches, self.provider, self.work, self.keeper)

    def of(self, model: nn.Module) -> BlockRunner:
        """The same batches in a model with the same blocks at the same paths, such as a changed copy."""
        other = copy.copy(self)
        other.model = model
        return other

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def tokens(self) -> int:
        return sum(batch["input_ids"].numel() for batch in self.batches if "input_ids" in batch) or 1

    def real(self, batch: int) -> Tensor | None:
        """The attention mask of a batch, [B, T], 0 at padding; None without one."""
        mask = self.batches[batch].get("attention_mask")
        return mask if mask is not None and mask.ndim == 2 else None

    def start(self, batch: int) -> Tensor:
        """The input stream of the first block, [B, T, D]."""
        return self._calls[batch][0].stream(_one(self.blocks[0].input))

    def walk(self, first: int = 0, last: int | None = None) -> Iterator[int]:
        """Block indices from `first` up to `last` (exclusive), each with its weights loaded while it is used."""
        for block in range(first, len(self.blocks) if last is None else last):
            self.keeper.release()
            self.provider.enter(self.blocks[block].path)
            yield block

    def step(self, block: int, batch: int, stream: Tensor) -> Tensor:
        """The residual stream after a block of the model as it is now.  [B, T, D] -> [B, T, D]."""
        found = self.blocks[block]
        self.provider.enter(found.path)
        module = self.model.get_submodule(found.path)
        args, kwargs = self.arguments(block, batch, stream.to(self.device(block, stream)))
        self.work.add(found.path, module, stream.shape[:2].numel())
        return outputs_of(module(*args, **kwargs))[_one(found.output)]

    def arguments(self, block: int, batch: int, stream: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a block on a batch, with this stream."""
        return self._calls[batch][block].on(_one(self.blocks[block].input), stream)

    def device(self, block: int, like: Tensor) -> torch.device:
        """The device that computes a block."""
        module = self.model.get_submodule(self.blocks[block].path)
        return next((p.device for p in module.parameters() if not p.is_meta), like.device)

    def run(self, first: int, batch: int, stream: Tensor) -> Tensor:
        """The stream after the last block, from the input stream of block `first`."""
        for block in range(first, len(self.blocks)):
            stream = self.step(block, batch, stream)
        return stream

    @property
    def picks_logits(self) -> bool:
        """Whether the model can compute logits at chosen positions only."""
        few = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        return few and next(hooks_of(self.model), None) is None  # with a device map they would be on another GPU

    def logits(self, batch: int, stream: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] from the stream after the last block, at `positions` only if given."""
        first = self.blocks[0]
        stream = stream.to(self.start(batch).device)

        def inject(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            return Call(args, kwargs).on(_one(first.input), stream)

        few = positions is not None and self.picks_logits
        with replaced(self.model, self._passing):
            hook = self.model.get_submodule(first.path).register_forward_pre_hook(inject, with_kwargs=True)
            try:
                output = self.model(**self.batches[batch], **({"logits_to_keep": positions} if few else {}))
            finally:
                hook.remove()
        logits = _logits_of(output)
        return logits if few or positions is None else logits[:, positions.to(logits.device)]

    def _record(self, batch: Mapping[str, Any]) -> list[Call]:
        calls: list[Call] = []
        with replaced(self.model, self._passing), ExitStack() as hooks:
            for block in self.blocks:
                module = self.model.get_submodule(block.path)
                see = lambda _m, args, kwargs: calls.append(Call(args, kwargs))  # noqa: E731
                hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
            self.model(**batch)
        return calls


def only_stack(architecture: Architecture) -> Stack:
    """The one stack of a model.  Raises ArchitectureError where there are several."""
    if len(architecture.stacks) != 1:
        raise ArchitectureError(
            f"this needs a model with one stack of blocks, and this one has {len(architecture.stacks)}; {SIMILARITY}"
        )
    if any(isinstance(block.input.key, tuple) for block in architecture.stacks[0].blocks):
        raise ArchitectureError(f"this model's blocks are reversible, with two streams; {SIMILARITY}")
    return architecture.stacks[0]


def _one(tap: Tap) -> int | str | None:
    """The key of a stream of one tensor.  Raises ArchitectureError for the two streams of a reversible block."""
    if isinstance(tap.key, tuple):
        raise ArchitectureError(
            f"its blocks carry two residual streams, which neither searches nor repairs can follow; {SIMILARITY}"
        )
    return tap.key


def _logits_of(output: Any) -> Tensor:
    """A model's logits, or its first output where it has none."""
    logits = getattr(output, "logits", None)
    return next(iter(outputs_of(output).values())) if logits is None else logits


def not_finite(model: nn.Module, dtype: torch.dtype) -> str:
    """What to say of logits that are no numbers."""
    return (
        f"{type(model).__name__} gives no finite logits in {str(dtype).removeprefix('torch.')}; compute in another "
        "--dtype (float32 overflows last), and if it stays so, its weights are broken"
    )


def check_blockwise(runner: BlockRunner, architecture: Architecture) -> None:
    """Raises ArchitectureError if blocks called one by one do not give the model's logits.

    So it is if they pass on more than the residual stream, or keep something of an earlier call, as of the other
    stream that goes first here.  Time: two passes over 16 tokens.
    """
    inputs = {name: value[:1, :16] for name, value in runner.batches[0].items() if isinstance(value, Tensor)}
    few = BlockRunner(runner.model, architecture, [inputs], runner.provider)
    with torch.inference_mode():
        few.run(0, 0, few.start(0).flip(1))
        found = few.logits(0, few.run(0, 0, few.start(0))).float()
        whole = _logits_of(few.model(**few.batches[0])).float().to(found.device)
    allowed = 1e-3 if few.start(0).dtype == torch.float32 else 5e-2
    if whole.isnan().any():
        raise ModelError(not_finite(runner.model, few.start(0).dtype))
    told = whole > torch.finfo(few.start(0).dtype).min  # not words that the model never writes
    if not float((found - whole)[told].norm()) <= allowed * float(whole[told].norm()):
        raise ArchitectureError(
            f"the blocks of {type(runner.model).__name__}, called one by one, do not give the model's logits: they "
            f"pass on more than the residual stream, or keep some of it; {SIMILARITY}"
        )
