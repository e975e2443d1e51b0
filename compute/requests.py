"""What is wrong with a request, as far as it can be said without looking at values: before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from compute.errors import BadInput

_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


def check_hidden(hidden: Tensor, rows: int | None, width: int) -> None:
    """Whether these can be hidden states.

    Args:
        hidden: What came.
        rows: How many there must be; ``None`` for any number but 0.
        width: Of the model.

    Raises:
        BadInput: ``bad-dtype``, ``bad-shape``.
    """
    if hidden.dtype not in _FLOATS:
        raise BadInput("bad-dtype", f"hidden states in {hidden.dtype}, expected 16 or 32 bit floats")
    if hidden.dim() != 3 or hidden.shape[0] != (rows or hidden.shape[0]) or hidden.shape[2] != width:
        raise BadInput("bad-shape", f"hidden states have shape {list(hidden.shape)}, not [{rows or 'b'}, t, {width}]")
    if hidden.shape[0] < 1 or hidden.shape[1] < 1:
        raise BadInput("bad-shape", "a step needs at least one token")


def read_order(order: Sequence[int], rows: int) -> Tensor:
    """Which row each row was before.

    Shapes:
        returns: [rows], int64

    Raises:
        BadInput: ``bad-value``: it is no order of so many rows.
    """
    if len(order) != rows or not all(is_integer(row, 0, rows - 1) for row in order):
        raise BadInput("bad-value", f"an order of rows is {rows} numbers below {rows}, not {list(order)!r:.60}")
    return torch.tensor(list(order), dtype=torch.int64)  # [rows]


def read_pads(pads: Sequence[int] | None, rows: int, max_length: int) -> Tensor | None:
    """How many tokens of padding each row begins with; ``None`` if no row has any.

    Shapes:
        returns: [rows], int64

    Raises:
        BadInput: ``bad-value``: it is no padding of so many rows, or leaves a row without a token of its own.
    """
    if pads is None:
        return None
    if not isinstance(pads, Sequence) or len(pads) != rows:
        raise BadInput("bad-value", f"the padding of rows is {rows} numbers, not {pads!r:.60}")
    if not all(is_integer(pad, 0, max_length - 1) for pad in pads):
        raise BadInput("bad-value", f"the padding of rows is {rows} numbers below {max_length}, not {pads!r:.60}")
    return torch.tensor(list(pads), dtype=torch.int64) if any(pads) else None  # [rows]


def is_integer(value: object, least: int, most: int | None = None) -> bool:
    """Whether ``value`` is an integer (``True`` is none) within bounds; requests may hold anything."""
    return type(value) is int and value >= least and (most is None or value <= most)
