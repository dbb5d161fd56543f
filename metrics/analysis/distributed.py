"""One analysis by several processes of an `accelerate launch` or `torchrun`, each on its own device.

Every process measures its share of the windows; results are gathered in all of them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dropformer.prune.errors import EvaluationError, ModelError, reason

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def rank() -> int:
    """This process's number among those launched together; 0 when it runs alone."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str | None) -> str | None:
    """The device for this process's model: under a launch its own GPU, by its number on the machine.

    Alone, or on the CPU, the device that was asked for.  Raises ModelError for one numbered GPU asked for by all.
    """
    if world() == 1 or device not in (None, "cuda"):
        if world() > 1 and str(device).startswith("cuda"):
            raise ModelError(
                f"--device {device} would put {world()} launched processes on one GPU; give --device cuda, by which "
                "each takes its own"
            )
        return device
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device or torch.cuda.is_available() else None


def join(device: Any) -> None:
    """Meet the other processes, if there are any; `device` decides how they talk.

    Raises EvaluationError where the environment tells of others that cannot be met.
    """
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    if world() > 1 and not dist.is_initialized():
        if getattr(device, "type", None) == "cuda":
            torch.cuda.set_device(device)  # NCCL talks through the current device
        try:
            PartialState(cpu=getattr(device, "type", str(device)) == "cpu")
        except (ValueError, RuntimeError) as error:  # torch's own DistError is a RuntimeError
            PartialState._reset_state()  # half of it is set: the next to ask would take it for met
            raise EvaluationError(
                f"WORLD_SIZE says that {world()} processes run, and they do not meet ({reason(error)}); start them "
                "with `accelerate launch`, or unset it"
            ) from None


def gather(mine: Tensor) -> Tensor:
    """Everyone's tensors, all of one shape [N, ...], in the order of the processes: [world x N, ...] in each."""
    import torch
    import torch.distributed as dist

    if not _joined():
        return mine
    own = mine.to(_talking_device()).contiguous()
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return torch.cat(found).to(mine.device)


def first_says(text: str) -> str:
    """Process 0's text, in every process."""
    import torch
    import torch.distributed as dist

    if not _joined():
        return text
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=_talking_device())
    size = torch.tensor([len(data)], device=data.device)
    dist.broadcast(size, 0)
    data = data if rank() == 0 else data.new_empty(int(size))
    dist.broadcast(data, 0)
    return bytes(data.cpu().tolist()).decode()


def _joined() -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def _talking_device() -> torch.device:
    """NCCL moves tensors between GPUs, gloo between CPUs."""
    import torch
    import torch.distributed as dist

    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
