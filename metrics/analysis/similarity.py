"""How much a layer changes the residual stream: the mathematics, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> per token, float32.  x, y: [..., D] float32 -> [...]."""
    if x.device.type == "cpu":  # twice as fast as vecdot there: no temporary of x * y
        return torch.einsum("...d,...d->...", x, y)
    return torch.linalg.vecdot(x, y)


def norm(x: Tensor) -> Tensor:
    """|x| per token, float32.  x: [..., D] float32 -> [...]."""
    return torch.linalg.vector_norm(x, dim=-1)


def cosine(xy: Tensor, x_norm: Tensor, y_norm: Tensor) -> Tensor:
    """cos(x, y) per token from <x, y>, |x| and |y|; 0 where a vector is zero.  [...] -> [...] in [-1, 1].

    1 - cosine is the importance of arXiv 2406.15786, eq. 1-4.
    """
    return (xy / (x_norm * y_norm).clamp_min(torch.finfo(torch.float32).tiny)).clamp(-1, 1)
