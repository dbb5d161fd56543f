"""Prove a written checkpoint: its tensors are the pruned model's, and the model that it describes gives its logits.

The checkpoint is never loaded a second time as a whole.  A model without weights is built from its config; block by
block, weights are read from the files, compared with those in memory, used for one small forward pass and let go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from dropformer.prune.block_map import Surgery, new_name
from dropformer.prune.errors import CheckpointError, VerificationError
from dropformer.prune.files import open_checkpoint
from dropformer.prune.files.config_json import read_config
from dropformer.prune.formats.writing import MODEL_TYPE
from dropformer.prune.loading.described import renamed_on_load, runs_own_code
from dropformer.prune.loading.device import hooks_of, input_device
from dropformer.prune.loading.load import build, load, read_model_config
from dropformer.prune.loading.parts import evaluating, input_embeddings
from dropformer.prune.loading.quiet import quiet_transformers
from dropformer.prune.samples.inputs import first_output
from dropformer.prune.samples.modalities import sample_batches
from dropformer.prune.surgery.views import equal_bits

BEYOND = 16  # tokens run beyond the windows of a stock model
LOGITS = 1e-4  # of the largest logit
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 1e-2}  # of the largest weight; 1e-6 in float32


def verify(folder: Path, model: PreTrainedModel, surgery: Surgery, dense_names: bool = False) -> float | None:
    """The largest difference of the written checkpoint's logits from those of the pruned model in memory.

    Text alone, and text with each modality that the model takes beside it (images, audio), are run.  `dense_names`:
    the files hold every layer of the dense model, the dropped ones silenced by zeros.

    Memory: one block beside the model, on its device; a checkpoint that is quantized, shares weights among blocks or
    leaves some to be computed is loaded whole.  None where there is no memory for that: the files were compared byte
    for byte as they were written, but nothing was run.

    Raises CheckpointError where a tensor is missing or unexpected, VerificationError where a tensor differs by more
    than rounding or a logit by more than 1e-4 of the largest.
    """
    trusted = runs_own_code(model)  # the folder's is a copy of what runs already
    checked = load(folder, model.dtype, "meta", trust_remote_code=trusted)  # names and shapes, nothing read
    try:
        with torch.inference_mode(), evaluating(model), ExitStack() as stack:
            pieces = _Pieces(folder, model, surgery, dense_names) if _in_pieces(folder, checked, surgery) else None
            if pieces and not pieces.computed():
                again = stack.enter_context(pieces.running())
            else:
                again = load(folder, model.dtype, input_device(model), trust_remote_code=trusted).eval()
            return max(
                _difference(model, again, inputs) for inputs in [*sample_batches(model), *_beyond(again, surgery)]
            )
    except (torch.cuda.OutOfMemoryError, MemoryError):
        return None
    except CheckpointError as error:
        if isinstance(error.__cause__, torch.cuda.OutOfMemoryError):
            return None
        raise


def _beyond(again: PreTrainedModel, surgery: Surgery) -> list[dict[str, Any]]:
    """For a stock model with windows, whose masks are not ours: a text longer than they are, its last logits alone."""
    windows = surgery.block_map.windows.values()
    if not windows or again.config.model_type == MODEL_TYPE:
        return []
    length = max(window.width for window in windows) + BEYOND
    embeddings: Any = input_embeddings(again)
    ids = torch.arange(length, device=input_device(again)) % embeddings.weight.shape[0]
    return [{"input_ids": ids[None], "logits_to_keep": BEYOND}]


def _difference(model: nn.Module, again: nn.Module, inputs: Mapping[str, Any]) -> float:
    """The largest difference of two models' logits.  Raises VerificationError where it is too large."""
    mine, theirs = (_seeded(each, inputs) for each in (model, again))
    difference = float((mine - theirs.to(mine.device)).abs().max())
    if not difference <= LOGITS * max(1.0, float(mine.abs().max())):
        raise VerificationError(
            "the written checkpoint gives other logits than the model in memory (largest difference "
            f"{difference:.3g}); nothing was kept"
        )
    return difference


def _seeded(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The first output, the same each time for a model that draws random numbers (Reformer's hash functions)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return first_output(model(**inputs))


def _in_pieces(folder: Path, checked: PreTrainedModel, surgery: Surgery) -> bool:
    """Can blocks be filled one by one?  Not where they are quantized or share weights with one another."""
    stacks = tuple(f"{stack.path}." for stack in surgery.outline.stacks)
    tied = getattr(checked, "all_tied_weights_keys", None) or {}
    quantized = read_config(folder).get("quantization_config")  # what is dequantized on loading forgets that it was
    return not quantized and not any(name.startswith(stacks) for pair in tied.items() for name in pair)


class _Pieces:
    """A model that is built from a checkpoint's config and filled from its files one block at a time."""

    def __init__(self, folder: Path, model: PreTrainedModel, surgery: Surgery, dense_names: bool) -> None:
        self.memory, self.surgery, self.dense_names = model, surgery, dense_names
        self.device = input_device(model)
        self.files = open_checkpoint(folder)
        config = read_model_config(folder, runs_own_code(model))
        with quiet_transformers(), init_empty_weights(include_buffers=False):  # buffers are computed, not read
            self.built = build(config, dtype=model.dtype).eval()
        for module in self.built.modules():
            for name, buffer in module.named_buffers(recurse=False):
                empty = buffer.is_meta  # of a dropped module, which took the device of the one it replaces
                setattr(module, name, torch.empty_like(buffer, device=self.device) if empty else buffer.to(self.device))
        self.how = LoadStateDictConfig(
            weight_mapping=cast(Any, get_model_conversion_mapping(self.built)),
            dtype=model.dtype,
            dtype_plan=self.built._get_dtype_plan(model.dtype),
            device_map={"": str(self.device)},
        )
        self.blocks = [
            f"{stack.path}.{i}"
            for stack in surgery.outline.stacks
            for i in range(len(list(self.built.get_submodule(stack.path).children())))
        ]
        self.shared: set[int] = set()  # weights that are the model's in memory
        self.rename = renamed_on_load(self.built)
        self.groups = self._grouped()

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """The model, whose blocks are loaded, compared, run and emptied in each forward pass inside the `with`."""
        for outside in [group for group in self.groups if group not in self.blocks]:
            self._fill(outside)
        absent = {name for name, p in self.built.named_parameters(remove_duplicate=False) if p.is_meta}
        self.built.tie_weights(missing_keys=absent, recompute_mapping=False)
        with ExitStack() as hooks:
            for path in self.blocks:
                block = self.built.get_submodule(path)
                hooks.callback(block.register_forward_pre_hook(partial(self._enter, path), prepend=True).remove)
                hooks.callback(block.register_forward_hook(self._leave).remove)
            yield self.built

    def computed(self) -> list[str]:
        """Parameters that the files lack and a model computes as it is loaded, such as sinusoidal positions."""
        read = {self.rename(tensor)[0] for tensors in self.groups.values() for tensor in tensors}
        tied = {name for pair in (getattr(self.built, "all_tied_weights_keys", None) or {}).items() for name in pair}
        return [name for name, _ in self.built.named_parameters() if name not in read | tied]

    def _grouped(self) -> dict[str, list[str]]:
        """The tensors of each block by its path, the others by the parameter that they make.

        A tensor that makes none is one that the model's class leaves out on loading (prediction heads): `load` has
        checked that no other is there.
        """
        groups = defaultdict(list)
        own = {name for name, _ in [*self.built.named_parameters(remove_duplicate=False), *self.built.named_buffers()]}
        for tensor in self.files.tensors:
            parameter = self.rename(tensor)[0]
            if parameter not in own:
                continue
            block = next((path for path in self.blocks if parameter.startswith(path + ".")), parameter)
            groups[block].append(tensor)
        return dict(groups)

    def _enter(self, path: str, block: nn.Module, *_: Any) -> None:
        if any(parameter.is_meta for parameter in block.parameters()):
            self._fill(path)

    def _leave(self, block: nn.Module, *_: Any) -> None:
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in self.shared:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _fill(self, group: str) -> None:
        """Read the tensors of a group and compare what they make; equal weights on one device are held once."""
        tensors = dict(self._read(group))
        with quiet_transformers():
            convert_and_load_state_dict_in_model(self.built, tensors, self.how)
        del tensors
        names = {self.rename(tensor)[0] for tensor in self.groups.get(group, ())}
        for owner, leaf, name in _entries(self.built, group if group in self.blocks else "", names):
            self._compare(owner, leaf, name)

    def _read(self, group: str) -> Iterator[tuple[str, Tensor]]:
        for tensor in self.groups.get(group, ()):
            with safe_open(self.files.shards[self.files.tensors[tensor].shard].path, "pt") as file:
                yield tensor, file.get_tensor(tensor)

    def _compare(self, owner: nn.Module, leaf: str, name: str) -> None:
        """Raises VerificationError where a tensor of the files is not the one in memory."""
        written = getattr(owner, leaf)
        ours = self._in_memory(name)
        if ours is None:
            return
        with ours as (holder, held):
            value = getattr(holder, held)
            if equal_bits(written, value):
                if not value.is_meta and value.device == written.device and next(hooks_of(holder), None) is None:
                    setattr(owner, leaf, value)
                    self.shared.add(id(value))
            elif not _close(written, value):
                raise VerificationError(
                    f"{name} of the written checkpoint is not that of the model in memory; nothing was kept"
                )

    def _in_memory(self, name: str) -> Any:
        """A `with` that gives the module and the attribute that hold a parameter of the pruned model, offloaded ones
        for its time; None for one that was dropped."""
        known = new_name(self.surgery.outline, self.surgery.block_map, name) if self.dense_names else name
        if known is None:
            return None
        path, _, leaf = known.rpartition(".")
        holder = self.memory.get_submodule(path)
        return _held(holder, leaf)


@contextmanager
def _held(module: nn.Module, leaf: str) -> Iterator[tuple[nn.Module, str]]:
    hook: Any = getattr(module, "_hf_hook", None)
    offloaded = hook is not None and any(p.is_meta for p in module.parameters(recurse=False))
    if offloaded:
        hook.pre_forward(module)
    try:
        yield module, leaf
    finally:
        if offloaded:
            hook.post_forward(module, None)


def _entries(model: nn.Module, path: str, names: set[str]) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, attribute, whole name) of the filled parameters below a path, and of those named."""
    below = [path] if path else sorted({name.rpartition(".")[0] for name in names})
    for base in below:
        for inner, module in model.get_submodule(base).named_modules() if path else [("", model.get_submodule(base))]:
            for leaf, parameter in module.named_parameters(recurse=False):
                name = ".".join(part for part in (base, inner, leaf) if part)
                if not parameter.is_meta and (path or name in names):
                    yield module, leaf, name


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal but for a rounding of the number type."""
    if one.shape != other.shape:
        return False
    left, right = one.float(), other.to(one.device).float()
    allowed = max(ROUNDING.get(one.dtype, 1e-6), ROUNDING.get(other.dtype, 1e-6))
    return bool((left - right).abs().max() <= allowed * right.abs().max())
