"""GPUs that are not there: tensors that say they lie on one and hold their numbers on the CPU.

Inside `fake_gpus()` every operation on tensors of two devices is an error, as CUDA has it: only a copy may cross, a
number of no dimensions may come from the CPU, and indices may.  Each wait of the host for a device is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAKE = "fake"
aten = torch.ops.aten
CROSSES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}


class Placed(Tensor):
    """A tensor on a GPU that is not there; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Placed:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=device, requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def __init__(self, held: Tensor, device: torch.device) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of a fake GPU outside of `fake_gpus`")


@dataclass
class Gpus(TorchDispatchMode):
    """What runs on fake GPUs; `waits`: how often the host waited for one, and by which operation.

    `operations`: how many have run on one.
    """

    waits: list[str] = field(default_factory=list)
    operations: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wanted = next((v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.device)), None)
        here = _common(func, args, kwargs)
        if func is aten._fused_sdp_choice.default:
            return 0  # the form of plain products
        if func is aten._has_compatible_shallow_copy_type.default:
            return False
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # inference mode hands over what is made of other operations
                return func.decompose(*args, **kwargs)
        self.operations += here is not None
        target = wanted or here
        if here is not None and (func in READS or (func in CROSSES and target.type == "cpu")):
            self.waits.append(str(func))
        if func is aten.copy_.default:
            target = args[0].device
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        own = {id(t.held): t for t in tree_leaves((args, kwargs)) if isinstance(t, Placed)}
        return tree_map(lambda value: _placed(value, target, own), found)


def _held(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == FAKE:
        return torch.device("cpu")
    return value.held if isinstance(value, Placed) else value


def _placed(value: Any, device: torch.device | None, own: dict[int, Placed]) -> Any:
    if not isinstance(value, Tensor) or device is None or device.type != FAKE:
        return value
    return own[id(value)] if id(value) in own else Placed(value, device)


def _common(func: Any, args: Any, kwargs: Any) -> torch.device | None:
    """The one GPU on which an operation's tensors lie; None where all are on the CPU.  Raises where they differ."""
    if func in CROSSES:
        sources = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Placed)]
        return sources[-1].device if sources else None
    looked = args[:1] if func in INDEXES else (args, kwargs)
    tensors = [t for t in tree_leaves(looked) if isinstance(t, Tensor)]
    devices = {t.device for t in tensors if isinstance(t, Placed) or t.ndim}
    if func in INDEXES:
        devices |= {t.device for t in tree_leaves(args[1:]) if isinstance(t, Placed)}
    if len(devices) > 1:
        raise RuntimeError(f"{func}: expected all tensors on one device, got {sorted(map(str, devices))}")
    return next((device for device in devices if device.type == FAKE), None)


@contextmanager
def fake_gpus() -> Iterator[Gpus]:
    """Inside the `with`, tensors can be moved to fake:0, fake:1 and so on."""
    _register()
    own, torch.inference_mode = torch.inference_mode, no_grad  # in which such tensors make no parameters
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # else a parameter keeps its class when moved
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its numbers on the CPU, then moves them
    try:
        with Gpus() as gpus:
            yield gpus
    finally:
        torch.inference_mode = own
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def no_grad(mode: bool = True) -> Any:
    return torch.no_grad() if mode else nullcontext()


@cache
def _register() -> None:
    """Make the device type known to torch, as one that nothing finds by itself."""
    hook = registration._DummyPrivateUse1Hook()
    hook.is_available = lambda: False
    registration._setup_privateuseone_for_python_backend(FAKE, hook=hook)
    vars(torch)[FAKE].device_count = lambda: 0  # else other tests' random numbers would ask it for its state
    vars(torch)[FAKE].get_amp_supported_dtype = lambda: []  # else other tests' checkpointed passes miss it


def gpu(number: int) -> str:
    return f"{FAKE}:{number}"


def spread(model: nn.Module, blocks: str, count: int = 2) -> nn.Module:
    """A model over several GPUs by accelerate: the first has what is before its blocks, the last what is behind."""
    from accelerate import dispatch_model

    parent, _, own = blocks.rpartition(".")
    stack = [name for name, _ in model.get_submodule(blocks).named_children()]
    places = {f"{blocks}.{name}": gpu(i * count // len(stack)) for i, name in enumerate(stack)}
    around = [name for name, _ in model.get_submodule(parent).named_children()]
    for name in around:
        if name != own:
            places[f"{parent}.{name}"] = gpu(count - 1 if around.index(name) > around.index(own) else 0)
    places |= {name: gpu(count - 1) for name, _ in model.named_children() if name != parent}
    return dispatch_model(model, device_map=places, force_hooks=True)
