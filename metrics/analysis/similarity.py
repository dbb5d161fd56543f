"""How much a layer changes the residual stream: the mathematics, as pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STACKED = 8 << 20  # bytes of a tensor up to which copying it costs a GPU less than one more launch


def norm(x: Tensor) -> Tensor:
    """|x| per token, summed in float32 (float64 for float64).  x: [..., D] of any floating type -> [...].

    The tensor is read once, without a copy of it in float32.
    """
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def norms(states: Sequence[Tensor]) -> list[Tensor]:
    """`norm` of each state."""
    return _together(norm, states)


def distances(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """`distance` of each state before from that after, row by row."""
    return _together(distance, before, after)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """|x - y| per token, float32.  x, y: [..., D] of one type -> [...].

    On a GPU two 16-bit states are subtracted in their own type, which moves half the bytes: exact where they are
    within a factor of two of each other (Sterbenz), rounded to 2^-9 of the difference elsewhere, which is less than
    what adding the branch rounded.  Over 4,096 dimensions that is about 1e-5 of a token's distance.
    """
    return norm(x - y) if x.device.type != "cpu" else norm(x.float() - y.float())


def cosine(distance: Tensor, x_norm: Tensor, y_norm: Tensor) -> Tensor:
    """cos(x, y) per token from |x - y|, |x| and |y|; 0 where a vector is zero.  [...] -> [...] in [-1, 1].

    1 - cosine is the importance of arXiv 2406.15786, eq. 1-4.  By the law of cosines it is
    (|x - y|^2 - (|x| - |y|)^2) / (2 |x| |y|), which loses no digits where x and y are almost alike: for a layer that
    changes the stream by a thousandth, <x, y> / (|x| |y|) in float32 leaves one digit of it.
    """
    product = x_norm * y_norm
    apart = distance.square() - (x_norm - y_norm).square()
    found = 1 - apart / (2 * product).clamp_min(torch.finfo(product.dtype).tiny)
    return torch.where(product > 0, found, 0.0 * apart).clamp(-1, 1)  # not 0.0 alone: NaN stays NaN


def stackable(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of those that can be stacked: of one shape and type, on one device."""
    groups: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]] = {}
    for number, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype, tensor.shape), []).append(number)
    return list(groups.values())


def _together(function: Callable[..., Tensor], *columns: Sequence[Tensor]) -> list[Tensor]:
    """function(*row) of each row of the columns, which is over the last dimension alone.

    On a GPU small rows are stacked, so that all share the kernels of one: the host needs longer to launch the norm of
    512 tokens than the device to take it.
    """
    found: dict[int, Tensor] = {}
    for rows in stackable(columns[0]):
        first = columns[0][rows[0]]
        if first.device.type == "cpu" or first.nbytes > STACKED or len(rows) == 1:
            found |= {row: function(*(column[row] for column in columns)) for row in rows}
        else:
            whole = function(*(torch.stack([column[row] for row in rows]) for column in columns))
            found |= dict(zip(rows, whole.unbind(), strict=True))
    return [found[row] for row in range(len(found))]
