"""GELU such that an element has the same bits wherever in a batch it stands.

torch splits an elementwise function over its threads in ranges of equal length and computes what is left at the end of
a range, less than two vectors, by another formula: the last bit differs. With 1 or 2 threads the ranges of a hidden
state happen to end at whole vectors; with 3, of 16 rows of 4,096 elements some differ from the same rows alone.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

_ALONE: Final = 16_384  # elements: up to so many, torch uses one thread; above, all that it has
_TWO_VECTORS: Final = 64  # elements, of the smallest floats in the widest registers


def gelu(wide: Tensor) -> Tensor:
    """GELU in the tanh form. Out of training, and on the CPU, ``wide`` may be overwritten.

    Shapes:
        wide: [..., 4d]
        returns: the same
    """
    if wide.requires_grad or wide.is_cuda:
        return F.gelu(wide, approximate="tanh")
    flat = wide.view(-1)  # [n]
    whole = _whole_vectors(flat.numel(), torch.get_num_threads())
    if whole and wide.shape[-1] % _TWO_VECTORS == 0:
        pieces: tuple[Tensor, ...] = (flat,)
    elif wide.shape[-1] % _TWO_VECTORS == 0:
        pieces = flat.split(_ALONE)  # one thread each, and whole vectors
    else:
        pieces = tuple(piece for row in flat.split(wide.shape[-1]) for piece in row.split(_ALONE))
    for piece in pieces:
        torch.ops.aten.gelu_(piece, approximate="tanh")
    return wide


def _whole_vectors(elements: int, threads: int) -> bool:
    """Whether every thread's range ends where a vector does."""
    return elements <= _ALONE or -(-elements // threads) % _TWO_VECTORS == 0
