"""Torch tensors <-> bytes on the wire.

The wire format is the elements in row-major order, little-endian, without padding; dtype and shape travel
beside them::

    f32   IEEE 754 binary32        f16   IEEE 754 binary16
    bf16  bfloat16                 i64   two's complement, 64 bits
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from compute.errors import BadInput

WIRE_DTYPES: Final[dict[str, torch.dtype]] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
}
_NAMES: Final = {dtype: name for name, dtype in WIRE_DTYPES.items()}
MAX_DIMENSIONS: Final = 8  # hidden states have 3; a longer shape is a mistake or an attack


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, not copied; the view keeps the memory alive.

    Raises:
        ValueError: The tensor is not contiguous or not on the CPU.
    """
    tensor = tensor.detach()
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("only a contiguous tensor on the CPU can be viewed as bytes")
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(b"")
    # torch has no buffer protocol of its own, and going through numpy would make it a dependency.
    array = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # ctypes arrays take attributes; this one keeps the memory
    return memoryview(array).cast("B").toreadonly()


def to_wire(tensor: Tensor) -> tuple[str, tuple[int, ...], memoryview]:
    """Name of the dtype, shape, and bytes. Not copied if the tensor is contiguous and on the CPU.

    The bytes are a read-only view: do not change the tensor before they are sent.

    Raises:
        BadInput: ``bad-dtype``: the dtype has no name on the wire.
    """
    name = _NAMES.get(tensor.dtype)
    if name is None:
        known = ", ".join(WIRE_DTYPES)
        raise BadInput("bad-dtype", f"{tensor.dtype} cannot be sent; convert to one of {known}")
    data = tensor.detach().cpu().contiguous()
    return name, tuple(tensor.shape), tensor_bytes(_little_endian(data))


def from_wire(dtype: str, shape: Sequence[int], data: memoryview | bytes | bytearray) -> Tensor:
    """A new tensor with memory of its own. Everything is checked before memory is allocated.

    Raises:
        BadInput: ``bad-dtype``: unknown name; ``bad-shape``: not a list of up to 8 non-negative integers, or
            not as many bytes as it says.
    """
    kind = WIRE_DTYPES.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise BadInput("bad-dtype", f"dtype {dtype!r:.40} is not one of {', '.join(WIRE_DTYPES)}")
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > MAX_DIMENSIONS
        or any(type(size) is not int or size < 0 for size in shape)
    ):
        raise BadInput("bad-shape", f"not a shape: {shape!r:.100}")
    expected = math.prod(shape) * kind.itemsize
    given = memoryview(data).nbytes
    if given != expected:
        raise BadInput("bad-shape", f"{dtype} {list(shape)} takes {expected} bytes, not {given}")
    if expected == 0:
        return torch.empty(tuple(shape), dtype=kind)
    flat = torch.frombuffer(bytearray(data), dtype=kind)  # [n], the bytearray is the copy
    return _little_endian(flat).reshape(tuple(shape))


def _little_endian(tensor: Tensor) -> Tensor:
    """The same tensor, its bytes swapped where the machine is big-endian."""
    if sys.byteorder == "little" or tensor.numel() == 0:
        return tensor
    flat = tensor.reshape(-1, 1).view(torch.uint8)  # [n, itemsize]
    return flat.flip(1).contiguous().view(tensor.dtype).reshape(tensor.shape)
