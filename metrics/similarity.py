"""How much a layer changes the residual stream: the mathematics, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> per token in float32.  x, y: [..., D] -> [...]."""
    return torch.linalg.vecdot(x.float(), y.float())


def cosine(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """cos(x, y) per token from the three dot products, 0 where a vector is zero.  [...] -> [...].

    1 - cosine is the importance of arXiv 2406.15786, eq. 1-4.
    """
    return xy / (xx * yy).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
